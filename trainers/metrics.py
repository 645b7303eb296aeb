"""Every metric of a run and the panels that show them, from metrics.toml: one table for all who name a metric."""

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# What stands in a name for a part that the run brings along: a reward function, a rank.
PLACEHOLDERS = {"NAME": r"[^/]+", "N": r"\d+"}


@dataclass(frozen=True)
class Metric:
    """One metric, or a family of them.

    Attributes:
        name: as logged; NAME or N in place of a word or a number of the run's own.
        unit, ranks, meaning: as in docs/metrics.md.
        summary: what wandb keeps of all steps: last, mean, max, or two of them with a comma.
        when: what a run needs to log it; empty where every run does.
        no_panel: why no panel shows it; empty where one does.
    """

    name: str
    unit: str
    ranks: str
    meaning: str
    summary: str = "last"
    when: str = ""
    no_panel: str = ""

    @property
    def is_family(self) -> bool:
        """Whether the name holds a placeholder."""
        return self.pattern != re.escape(self.name)

    @property
    def pattern(self) -> str:
        """A regular expression of the logged names.

        >>> Metric("rank/N/cpu_s", "s", "each", "").pattern
        'rank/\\\\d+/cpu_s'
        """
        parts = re.split(r"(?<![A-Z])(NAME|N)(?![A-Z])", self.name)
        return "".join(PLACEHOLDERS.get(part, re.escape(part)) for part in parts)


@dataclass(frozen=True)
class Panel:
    """One picture.

    Attributes:
        section: of the dashboard.
        title: of the panel, unlike all others.
        metrics: at least one, all of one unit.
        stacked: they add up, and are drawn one on the other.
    """

    section: str
    title: str
    metrics: tuple[Metric, ...]
    stacked: bool = False

    @property
    def unit(self) -> str:
        """Of all its metrics."""
        return self.metrics[0].unit

    def names(self, logged: Iterable[str]) -> list[str]:
        """Which of the logged names it shows, in its own order; of a family in that of the numbers or words.

        >>> panel_of("rank/0/cpu_s").names(["rank/10/cpu_s", "rank/9/cpu_s", "train/loss"])
        ['rank/9/cpu_s', 'rank/10/cpu_s']
        """
        logged = sorted(set(logged), key=_by_words_and_numbers)
        return [name for metric in self.metrics for name in logged if metric_of(name) is metric]


@cache
def all_metrics() -> Mapping[str, Metric]:
    """All metrics, by the name in the table."""
    return {name: Metric(name, **about) for name, about in _table()["metrics"].items()}


@cache
def all_panels() -> tuple[Panel, ...]:
    """All panels, in the order of the sections.

    >>> list(dict.fromkeys(panel.section for panel in all_panels()))
    ['Throughput', 'Time of a step', 'Scheduler and host gap', 'Rank health', 'Learning', 'Samples']
    """
    return tuple(
        Panel(section, title, tuple(all_metrics()[name] for name in about.pop("metrics")), **about)
        for section, of_section in _table()["panels"].items()
        for title, about in of_section.items()
    )


@cache
def metric_of(name: str) -> Metric | None:
    """What the table says of a logged name; None where it says nothing.

    >>> metric_of("reward/short_mean").name, metric_of("reward/mean").name, metric_of("reward/median")
    ('reward/NAME_mean', 'reward/mean', None)
    """
    if name in all_metrics() and not all_metrics()[name].is_family:
        return all_metrics()[name]
    families = (metric for metric in all_metrics().values() if metric.is_family)
    return next((metric for metric in families if re.fullmatch(metric.pattern, name)), None)


def panel_of(name: str) -> Panel | None:
    """Which panel shows a logged name; None where none does.

    >>> panel_of("rank/3/rss_gib").title, panel_of("sync/version")
    ('Memory of the ranks', None)
    """
    metric = metric_of(name)
    return next((panel for panel in all_panels() if metric in panel.metrics), None)


def _by_words_and_numbers(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split("/")]


def _table() -> dict:
    return tomllib.loads((Path(__file__).parent / "metrics.toml").read_text())
