"""The one table of metrics: the docs say the same, every metric has its panel, and no panel mixes units."""

import re
from pathlib import Path

import pytest

from trainers.metrics import all_metrics, all_panels, metric_of, panel_of

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "metrics.md").read_text()

# No metrics: a table of wandb's, what the pictures make of the phases, parts of a name, a doctest's.
OTHERS = {"eval/samples", "phase/other_s", "rank/cpu_s", "reward/short_mean", "reward/median"}


def documented() -> dict[str, tuple[str, str, str]]:
    """Meaning, unit and ranks of every metric in docs/metrics.md."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): (row[1], row[2], row[3]) for row in rows if len(row) >= 4}


def test_the_docs_say_the_same() -> None:
    table = {name: (metric.meaning, metric.unit, metric.ranks) for name, metric in all_metrics().items()}
    assert table == documented()
    assert len(table) > 50


def test_each_metric_has_one_panel_or_a_reason_for_none() -> None:
    shown = [metric.name for panel in all_panels() for metric in panel.metrics]
    assert len(shown) == len(set(shown))
    without = {name for name, metric in all_metrics().items() if metric.no_panel}
    assert set(shown) | without == all_metrics().keys() and not without & set(shown)


def test_a_panel_has_one_unit_and_a_title_of_its_own() -> None:
    assert len({panel.title for panel in all_panels()}) == len(all_panels())
    for panel in all_panels():
        assert len({metric.unit for metric in panel.metrics}) == 1, panel.title


def test_wandb_knows_the_summaries() -> None:
    for name, metric in all_metrics().items():
        assert set(metric.summary.split(",")) <= {"last", "mean", "max"}, name


@pytest.mark.parametrize(
    "name", ["rank/x/rss_gib", "rank/0/rss_gib/x", "reward/a/b_mean", "rollout/SECONDS", "phase/x_s"]
)
def test_a_name_that_no_line_covers(name: str) -> None:
    assert metric_of(name) is None and panel_of(name) is None


def test_what_the_code_names_is_in_the_table() -> None:
    """All literal names of the sources, so that none is forgotten that only some runs have."""
    kinds = "|".join(dict.fromkeys(name.partition("/")[0] for name in all_metrics()))
    source = "\n".join(file.read_text() for folder in ("rollout", "trainers") for file in (ROOT / folder).glob("*.py"))
    named = set(re.findall(rf'"((?:{kinds})/\w*[a-z0-9])"', source)) - OTHERS
    phases = {f"phase/{name}_s" for name in re.findall(r'\bphase\("(\w+)"\)', source)}
    assert len(named) > 40 and len(phases) > 5
    assert named | phases <= all_metrics().keys()
