"""What a run's folder says of it, read for a reader: figures, config, environment, samples."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import yaml

from trainers.config import EvaluateConfig, Experiment, GRPOConfig, PPOConfig
from trainers.dashboard import read_metrics
from trainers.metrics import panel_of

OF_SECTION = {"ppo": PPOConfig, "grpo": GRPOConfig}
"""The experiment that a config with such a section is of."""
OF_NO_INTEREST = ("run.", "wandb.")
"""Sections that say only where a run is recorded."""
ENDS = 5  # the first and the last steps whose mean reward is shown


@dataclass(frozen=True)
class Run:
    """One run's folder.

    Attributes:
        name: of the folder, with as much of its path as sets it apart from the others.
        rows: of metrics.jsonl.
        config: as run, by section; empty without a config.yaml.
        environment: empty without an environment.json.
        samples, eval_samples: what was said in training and in evaluation.
        failure: of a run that failed.
    """

    name: str
    rows: list[dict[str, float]]
    config: dict[str, Any]
    environment: dict[str, Any]
    samples: list[dict[str, Any]]
    eval_samples: list[dict[str, Any]]
    failure: dict[str, Any] | None

    @property
    def names(self) -> list[str]:
        """Of all metrics that were logged."""
        return [name for name in dict.fromkeys(name for row in self.rows for name in row) if name != "step"]

    @property
    def algorithm(self) -> str:
        """Which section of hyperparameters the config has; empty of an evaluation."""
        return next((section for section in OF_SECTION if section in self.config), "")

    @property
    def steps(self) -> int:
        """That were trained: a row of an evaluation alone is none."""
        return sum("step/seconds" in row for row in self.rows)

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps (rows that have it,) int64 and values (as many,) float64 of one metric, non-finite ones included."""
        points = [(row["step"], row[name]) for row in self.rows if name in row]
        return np.array([step for step, _ in points], int), np.array([value for _, value in points], float)

    def finite(self, name: str) -> list[float]:
        """The values of `series` that are numbers."""
        values = self.series(name)[1]
        return values[np.isfinite(values)].tolist()


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of these folders, in this order.

    Raises:
        ValueError: if a folder holds no metrics, or is given twice.
    """
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise ValueError("a run is given twice; give each folder once")
    depth = 1
    while len({folder.parts[-depth:] for folder in resolved}) < len(resolved):
        depth += 1
    return [_read_run(folder, "/".join(folder.parts[-depth:])) for folder in resolved]


def _read_run(folder: Path, name: str) -> Run:
    rows = read_metrics(folder)
    if not rows:
        raise ValueError(f"{folder} has no metrics.jsonl with a step in it; give the folder of a run that finished one")
    config = folder / "config.yaml"
    return Run(
        name=name,
        rows=rows,
        config=yaml.safe_load(config.read_text()) or {} if config.exists() else {},
        environment=_read_json(folder / "environment.json") or {},
        samples=_read_lines(folder / "samples.jsonl"),
        eval_samples=_read_lines(folder / "eval_samples.jsonl"),
        failure=_read_json(folder / "failure.json"),
    )


def _read_json(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text()) if file.exists() else None


def _read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file, one a line; a line that a crash cut short is left out."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


@dataclass(frozen=True)
class Headline:
    """One figure of a run.

    Attributes:
        label: what it is.
        value: as it is shown.
        note: what it stands beside, such as where it began.
        score: to compare runs by, the higher the better; None where neither is better.
    """

    label: str
    value: str
    note: str = ""
    score: float | None = None


def headlines(run: Run) -> dict[str, Headline]:
    """The figures that a run is judged by, those that it has, by their labels."""
    found = []
    if rewards := run.finite("reward/mean"):
        first, last = fmean(rewards[:ENDS]), fmean(rewards[-ENDS:])
        count = min(len(rewards), ENDS)
        steps = "step" if count == 1 else f"{count} steps"
        found.append(Headline("Reward", f"{last:.3f}", f"last {steps}; first: {first:.3f}", last))
    if accuracy := run.finite("eval/accuracy"):
        note = f"held out, greedy; first: {accuracy[0]:.3f}" if len(accuracy) > 1 else "held out, greedy"
        found.append(Headline("Accuracy", f"{accuracy[-1]:.3f}", note, accuracy[-1]))
    if rates := run.finite("rollout/generated_tokens_per_s"):
        found.append(Headline("Tokens/s", f"{median(rates):,.0f}", "median while generating", median(rates)))
    if seconds := run.finite("step/seconds"):
        note = f"median; {sum(seconds) / 60:.1f} min in all"
        found.append(Headline("Step", f"{median(seconds):.1f} s", note, -median(seconds)))
    if shares := phase_shares(run):
        phase, share = max(shares.items(), key=lambda item: item[1])
        found.append(Headline("Longest phase", f"{share:.0%}", phase.removeprefix("phase/").removesuffix("_s")))
    memory = [name for name in run.names if (panel := panel_of(name)) and panel.title == "Memory of the ranks"]
    if peak := max((value for name in memory for value in run.finite(name)), default=0.0):
        found.append(Headline("Memory", f"{peak:.1f} GiB", "of a rank, at most", -peak))
    if run.steps:
        wanted = run.config.get(run.algorithm, {}).get("steps")
        found.append(Headline("Steps", str(run.steps), f"of {wanted}" if wanted else ""))
    return {headline.label: headline for headline in found}


def phase_shares(run: Run) -> dict[str, float]:
    """The share of each phase in the time of all of them."""
    totals = {name: sum(run.finite(name)) for name in run.names if name.startswith("phase/")}
    whole = sum(totals.values())
    return {name: seconds / whole for name, seconds in totals.items()} if whole else {}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping by dotted keys.

    >>> flat({"ppo": {"steps": 3, "critic": None}, "tags": ["a"]})
    {'ppo.steps': 3, 'ppo.critic': None, 'tags': ['a']}
    """
    keys: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            keys |= flat(value, f"{prefix}{key}.")
        else:
            keys[f"{prefix}{key}"] = value
    return keys


def defaults_of(run: Run) -> dict[str, Any]:
    """Of every key that a run of its kind has."""
    kind: type[Experiment] = OF_SECTION.get(run.algorithm, EvaluateConfig)
    return flat(json.loads(json.dumps(dataclasses.asdict(kind()))))  # tuples as lists, as YAML has them


def settings(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """Keys that are of interest, each with its value in every run (an en dash where the run has no such key).

    Of one run those that are not at their defaults; of several those in which they differ, where hyperparameters of one
    name are one key, whatever the algorithm. Where the run is recorded is of no interest.
    """
    algorithms = "/".join(dict.fromkeys(run.algorithm for run in runs if run.algorithm))
    configs = [
        flat({algorithms if key == run.algorithm else key: run.config[key] for key in run.config}) for run in runs
    ]
    compared = [defaults_of(runs[0]), *configs] if len(runs) == 1 else configs
    keys = [
        key for key in dict.fromkeys(key for config in configs for key in config) if not key.startswith(OF_NO_INTEREST)
    ]
    differing = [key for key in keys if any(config.get(key, "–") != compared[0].get(key, "–") for config in compared)]
    return [(key, [config.get(key, "–") for config in configs]) for key in differing]
