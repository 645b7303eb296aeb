"""Make a model folder, which transformers and vLLM load, of a run's newest checkpoint or of any one of them.

    python scripts/export.py RUN_OR_CHECKPOINT OUT [--model PATH]

The end of a run does the same by itself, into RUN/policy.
"""

import argparse
import sys
from pathlib import Path

from trainers.errors import ConfigError


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, help="a run's folder, or RUN/checkpoints/step-NUMBER")
    parser.add_argument("out", type=Path, help="the folder to write; must not exist")
    parser.add_argument("--model", help="where the model that the run began with lies now, if it was moved")
    args = parser.parse_args()
    try:
        export(args.source, args.out, args.model)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def export(source: Path, out: Path, model: str | None) -> None:
    if out.exists():
        raise ConfigError(f"{out} exists and is not overwritten; give another folder")
    from trainers.export import export_checkpoint  # seconds to import: a wrong path is told at once
    from trainers.resume import find_checkpoint

    checkpoint = find_checkpoint(source)
    step = export_checkpoint(checkpoint, out, model)
    print(f"{out}: the policy after {step} steps, from {checkpoint}")


if __name__ == "__main__":
    main()
