"""The report: one HTML page that needs nothing but itself."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from trainers.metrics import all_panels, metric_of, panel_of
from trainers.report.charts import DASHES, MAX_POINTS, SERIES, Chart, charts_of, tick
from trainers.report.runs import Headline, Run, headlines, settings

SAMPLES = 80  # rows of a table for each run
ABOUT = {
    "Throughput": "What is made in a second, and how much a step makes.",
    "Time of a step": "Where the wall-clock time goes.",
    "Scheduler and host gap": "Whether the device ever waits for the host.",
    "Rank health": "Every rank beside the others: the slowest one sets the pace.",
    "Learning": "Whether the policy gets better, and how far each step moves it.",
    "Samples": "What the model said, and how long it went on.",
}
"""By section."""
COLUMNS = ("step", "reward", "score", "prompt", "response", "answer", "tokens", "finish_reason", "finished", "version")
"""Of the tables of samples: those of them that the samples have, in this order."""


def report(runs: Sequence[Run], now: datetime | None = None) -> str:
    """The page of these runs.

    What a run says (its samples, its config, its name) is text and never markup, and the page forbids itself any
    request (Content-Security-Policy).

    Args:
        runs: at least one; of several each has a colour, and their figures stand side by side.
        now: shown as the page's date.
    """
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": tick, "compact": lambda data: Markup(_json_in_html(data))}
    found = [headlines(run) for run in runs]
    return environment.get_template("page.html").render(
        css=Markup((folder / "page.css").read_text()),
        js=Markup((folder / "page.js").read_text()),
        runs=runs,
        series=SERIES,
        dashes=[" ".join(map(str, pattern)) for _, pattern in DASHES],
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        date=(now or datetime.now(UTC)).strftime("%Y-%m-%d"),
        subtitles=[subtitle(run) for run in runs],
        headlines=found,
        labels=list(dict.fromkeys(label for of_run in found for label in of_run)),
        best=best_of(found),
        sections=sections(runs),
        meaning=lambda chart: {line.label: metric_of(line.label).meaning for line in chart.lines},  # type: ignore[union-attr]
        unlisted=[name for name in dict.fromkeys(n for run in runs for n in run.names) if metric_of(name) is None],
        unshown={metric.name: metric.no_panel for metric in _without_panel(runs)},
        tables=tables(runs),
        settings=settings(runs),
        configs=[yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) for run in runs],
        environments=environments(runs),
        max_points=MAX_POINTS,
    )


def subtitle(run: Run) -> str:
    """What a run was, in a line."""
    environment = run.environment
    model = str(run.config.get("model", {}).get("path", ""))
    ranks = environment.get("world_size")
    parts = [
        run.algorithm.upper() or "evaluation",
        Path(model).name,
        f"{ranks} rank{'s' if ranks != 1 else ''}" if ranks else "",
        (environment.get("devices") or [environment.get("cpu", "")])[0],
        f"commit {environment['git_commit'][:10]}" if environment.get("git_commit") else "",
    ]
    return " · ".join(part for part in parts if part)


def best_of(found: Sequence[dict[str, Headline]]) -> dict[str, int]:
    """By label the run whose figure is the best of several; none where they read alike."""
    best = {}
    for label in {label for of_run in found for label in of_run}:
        scores = [of_run[label].score if label in of_run else None for of_run in found]
        known = [score for score in scores if score is not None]
        if len(known) > 1 and len({of_run[label].value for of_run in found if label in of_run}) > 1:
            best[label] = scores.index(max(known))
    return best


def sections(runs: Sequence[Run]) -> list[tuple[str, str, list[Chart]]]:
    """Name, what it is about and charts of every section, those without a chart too."""
    names = dict.fromkeys(panel.section for panel in all_panels())
    charts = {name: [] for name in names}  # type: dict[str, list[Chart]]
    for panel in all_panels():
        charts[panel.section] += charts_of(panel, runs)
    return [(name, ABOUT[name], charts[name]) for name in names]


def _without_panel(runs: Sequence[Run]) -> list[Any]:
    logged = dict.fromkeys(name for run in runs for name in run.names)
    return [metric for name in logged if (metric := metric_of(name)) is not None and panel_of(name) is None]


def tables(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The tables of samples: title, columns, rows by step (run's number, cells by column), how many there are."""
    made = []
    for title, kind in (("In training", "samples"), ("In evaluation, greedy", "eval_samples")):
        everyones: list[list[dict[str, Any]]] = [getattr(run, kind) for run in runs]
        rows = [(index, sample) for index, samples in enumerate(everyones) for sample in spread(samples, SAMPLES)]
        rows.sort(key=lambda row: row[1].get("step", 0))
        columns = [column for column in COLUMNS if any(column in sample for _, sample in rows)]
        if rows:
            made.append({"title": title, "columns": columns, "rows": rows, "total": sum(map(len, everyones))})
    return made


def spread(samples: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most `most` of them, spread over the run, the first and the last one among them.

    >>> spread(list(range(10)), 4)
    [0, 3, 6, 9]
    """
    if len(samples) <= most:
        return list(samples)
    return [samples[index] for index in np.linspace(0, len(samples) - 1, most).round().astype(int)]


def environments(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Every entry of the runs' environments, packages one by one, as text; an en dash where a run lacks it."""
    flattened = []
    for run in runs:
        entries = {key: value for key, value in run.environment.items() if key != "packages"}
        flattened.append(entries | run.environment.get("packages", {}))
    keys = dict.fromkeys(key for entries in flattened for key in entries)
    return [
        (key, ["–" if entries.get(key) in (None, []) else _text(entries[key]) for entries in flattened]) for key in keys
    ]


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _json_in_html(data: Any) -> str:
    """JSON for a script element: without a character that could end it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
