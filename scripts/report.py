"""A report of one run, or of several side by side: one HTML file that opens without a network.

    python scripts/report.py RUN... [--output FILE]

RUN is a run's folder. Of one run the page is written to RUN/report.html, of several to report.html: charts of all
metrics in the sections of docs/metrics.md, samples, config, environment, and the reason of a failure.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/ is no installed package

from trainers.report.page import report  # noqa: E402
from trainers.report.runs import read_runs  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, with its metrics.jsonl")
    parser.add_argument("--output", type=Path, help="the file to write; an existing one is replaced")
    args = parser.parse_args()
    try:
        runs = read_runs(args.runs)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    output = args.output or (args.runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    output.write_text(report(runs))
    print(f"{output}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
