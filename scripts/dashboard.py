"""A workspace on wandb for our runs: every metric in a panel, sorted into sections, instead of one panel a name.

    python scripts/dashboard.py RUN... [--entity NAME] [--project NAME] [--name NAME] [--output FILE]

RUN is a run's folder: its metrics say which panels there are, its config says which project. Where wandb finds a login
the workspace is saved there, under a name, for all runs of the project. Elsewhere, or with --output, its specification
is written to a file as JSON.
"""

import argparse
import json
import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/ is no installed package

from trainers.dashboard import read_metrics, wandb_mode  # noqa: E402
from trainers.metrics import Panel, all_panels  # noqa: E402
from trainers.workspace import TABLES, specification, workspace  # noqa: E402


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, with its metrics.jsonl")
    parser.add_argument("--entity", help="user or team; else wandb.entity of the first run, else the login's own")
    parser.add_argument("--project", help="else wandb.project of the first run")
    parser.add_argument("--name", default="Rollouts and training", help="of the workspace (%(default)s)")
    parser.add_argument("--output", type=Path, help="write the specification there, and save nothing on wandb")
    args = parser.parse_args()
    for run in args.runs:
        if not read_metrics(run):
            parser.error(f"{run} has no metrics.jsonl with a step in it; give the folder of a run that finished a step")
    settings = wandb_settings(args.runs[0])
    args.project = args.project or settings.get("project") or "torchrun-rollout"
    args.entity = args.entity or settings.get("entity")
    return args


def wandb_settings(run: Path) -> dict:
    """The section `wandb` of the run's config; empty without one."""
    file = run / "config.yaml"
    return (yaml.safe_load(file.read_text()) or {}).get("wandb", {}) if file.exists() else {}


def tables_of(run: Path) -> set[str]:
    """The tables that wandb has of the run, by the files that they are made of."""
    files = {"samples": "samples.jsonl", "eval/samples": "eval_samples.jsonl"}
    return {table for tables in TABLES.values() for table in tables if (run / files[table]).exists()}


def described(panel: Panel) -> str:
    """A panel and what a run needs to fill it."""
    return f"{panel.title} ({panel.metrics[0].when})" if panel.metrics[0].when else panel.title


def main() -> None:
    args = arguments()
    logged = {name for run in args.runs for row in read_metrics(run) for name in row}
    tables = set().union(*map(tables_of, args.runs))
    online = args.output is None and wandb_mode("auto") == "online"
    if online and args.entity is None:
        import wandb

        args.entity = wandb.Api().default_entity
    made = workspace(args.entity or "", args.project, args.name, logged, tables)
    if online:
        print(made.save().url)
    else:
        file = args.output or args.runs[0] / "workspace.json"
        file.write_text(json.dumps(specification(made), indent=1) + "\n")
        print(f"{file}: {len(made.sections)} sections, {sum(len(section.panels) for section in made.sections)} panels")
    if left_out := [panel for panel in all_panels() if not panel.names(logged)]:
        print(f"  left out, since nothing was logged for them: {'; '.join(map(described, left_out))}")
    if not online and args.output is None:
        print("wandb has no login here. To have the workspace there: `wandb login`, then upload the runs with")
        print(f"`wandb sync {args.runs[0]}/wandb/offline-run-*`, and give this command again.")


if __name__ == "__main__":
    main()
