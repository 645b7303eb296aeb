"""The report: what it shows of made-up runs, that nothing of theirs becomes markup, and how it fares in a browser."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.browser import find_browser, page
from tests.made_run import make_run
from trainers.dashboard import to_json_line
from trainers.metrics import all_panels, panel_of
from trainers.report.charts import Chart, charts_of, limits
from trainers.report.page import report, tables
from trainers.report.runs import headlines, read_runs, settings

REPOSITORY = Path(__file__).parents[2]
SECTIONS = list(dict.fromkeys(panel.section for panel in all_panels()))
in_a_browser = pytest.mark.skipif(find_browser() is None, reason="no Chromium here: `apt-get install -y chromium`")


def write_rows(folder: Path, *rows: dict[str, float]) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(to_json_line(step, row) for step, row in enumerate(rows)))
    return folder


def chart_of(folder: Path, name: str) -> Chart:
    panel = panel_of(name)
    assert panel is not None
    (chart,) = charts_of(panel, read_runs([folder]))
    return chart


def test_the_page_of_one_run_has_all_sections_figures_and_settings(tmp_path):
    run = make_run(tmp_path / "sums")
    html = report(read_runs([run]))
    for section in SECTIONS:
        assert f'<section id="{section.lower().replace(" ", "-")}">' in html
    shown = {panel.title for panel in all_panels() if f"<h3>{panel.title}" in html}
    assert len(shown) >= 30 and {"Phases", "Memory of the ranks", "Reward", "Length of responses"} <= shown
    assert "<h3>GPU memory of the ranks" not in html  # nothing was logged
    assert html.count("<svg viewBox") == len(re.findall(r'<figure class="chart"', html)) == len(shown)
    assert "optimizer.learning_rate" in html and "2e-05" in html and "2.13.0+cpu" in html
    assert "sync/version (the number of the step" in html
    assert len(html) < 600_000


def test_a_run_says_text_and_never_markup(tmp_path):
    evil = '</script><script>alert(1)</script><img src="http://example.org/x.png">'
    run = write_rows(
        tmp_path / "<u>&", {"reward/mean": 0.5, f"reward/{evil.replace('/', ' ')}_mean": 0.5, "new/<i>": 1}
    )
    (run / "samples.jsonl").write_text(json.dumps({"step": 0, "prompt": evil, "response": evil, "reward": 1}) + "\n")
    (run / "config.yaml").write_text(f"grpo:\n  advantage: '{evil}'\n")
    (run / "environment.json").write_text(json.dumps({"command": evil, "packages": {evil: evil}, "devices": [evil]}))
    (run / "failure.json").write_text(json.dumps({"rank": 1, "error": evil}))
    html = report(read_runs([run]))
    assert html.count("alert(1)") >= 6  # it is all there
    assert "<script>alert" not in html and "<img" not in html and "<u>" not in html and "new/<i>" not in html
    assert html.count("<script") == html.count("</script>") == 1 + html.count('<figure class="chart"')


def test_several_runs_stand_side_by_side(tmp_path):
    folders = [make_run(tmp_path / name, seed=seed, learning_rate=rate) for name, seed, rate in
               (("a", 0, 2e-5), ("b", 1, 5e-6))]  # fmt: skip
    runs = read_runs(folders)
    assert settings(runs) == [("optimizer.learning_rate", [2e-5, 5e-6])]
    html = report(runs)
    assert "<title>2 runs compared</title>" in html and "<h3>Phases, a" in html and "<h3>Phases, b" in html
    (chart,) = charts_of(panel_of("train/entropy"), runs)
    assert [(line.run, line.colour) for line in chart.lines] == [("a", 1), ("b", 2)]
    assert [row["step"] for _, row in tables(runs)[0]["rows"]] == sorted([*range(6)] * 8)


def test_settings_of_two_algorithms_meet_under_one_key(tmp_path):
    for name, text in (("a", "grpo: {steps: 2, oversample: 0}"), ("b", "ppo: {steps: 3}\nrun: {name: b}")):
        (write_rows(tmp_path / name, {"reward/mean": 0.5}) / "config.yaml").write_text(text)
    shown = settings(read_runs([tmp_path / "a", tmp_path / "b"]))
    assert shown == [("grpo/ppo.steps", [2, 3]), ("grpo/ppo.oversample", [0, "–"])]


def test_runs_of_one_name_are_told_apart_and_mistakes_are_named(tmp_path):
    for parent in ("x", "y"):
        make_run(tmp_path / parent / "run", steps=1)
    assert [run.name for run in read_runs([tmp_path / "x" / "run", tmp_path / "y" / "run"])] == ["x/run", "y/run"]
    with pytest.raises(ValueError, match="given twice"):
        read_runs([tmp_path / "x" / "run", tmp_path / "x" / "y" / ".." / "run"])
    with pytest.raises(ValueError, match="give the folder of a run that finished one"):
        read_runs([tmp_path])


def test_headlines(tmp_path):
    memory = {"memory/rss_gib": 1.0, "rank/1/rss_gib": 3.0}
    rows = [{"reward/mean": step / 10, "step/seconds": 2.0 + step} | memory for step in range(10)]
    rows.append({"eval/accuracy": 0.5})
    (run,) = read_runs([write_rows(tmp_path / "run", *rows)])
    shown = {label: (headline.value, headline.note) for label, headline in headlines(run).items()}
    assert shown == {
        "Reward": ("0.700", "last 5 steps; first: 0.200"),  # (0.5 + ... + 0.9) / 5; (0 + ... + 0.4) / 5
        "Accuracy": ("0.500", "held out, greedy"),
        "Step": ("6.5 s", "median; 1.1 min in all"),  # 2 to 11 s: 65 s
        "Memory": ("3.0 GiB", "of a rank, at most"),
        "Steps": ("10", ""),
    }


def test_a_chart_places_steps_and_values(tmp_path):
    folder = write_rows(tmp_path / "run", {"train/entropy": 0.0}, {"train/entropy": 1.0}, {"train/entropy": 0.5})
    chart = chart_of(folder, "train/entropy")
    (line,) = chart.data["lines"]
    scale, start = chart.data["x"]
    bottom, one, half = line["y"]
    assert line["values"] == [0.0, 1.0, 0.5] and half == pytest.approx((bottom + one) / 2, abs=0.1) and one < half
    points = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', chart.svg)  # matplotlib's own marks
    assert [(float(x), float(y)) for x, y in points] == [
        (pytest.approx(scale * step + start, abs=0.1), pytest.approx(y, abs=0.1)) for step, y in enumerate(line["y"])
    ]
    assert "var(--series-1)" in chart.svg and "#0000" not in chart.svg and "<metadata" not in chart.svg


def test_phases_stack_and_a_phase_that_was_not_logged_is_nothing(tmp_path):
    folder = write_rows(tmp_path / "run", {"phase/generate_s": 2.0, "phase/optimize_s": 4.0}, {"phase/optimize_s": 3.0})
    generate, optimize = chart_of(folder, "phase/generate_s").lines
    assert (generate.values.tolist(), optimize.values.tolist()) == ([2.0, 0.0], [4.0, 3.0])
    chart = chart_of(folder, "phase/generate_s")
    lower, upper = chart.data["lines"]
    ground = lower["y"][1]  # 0 s
    second = (ground - lower["y"][0]) / 2
    assert upper["values"] == [4.0, 3.0]  # says its own seconds, and stands on the other
    assert upper["y"] == pytest.approx([ground - 6 * second, ground - 3 * second], abs=0.1)
    bars = re.findall(r'<path d="([^"]*)"[^>]*fill: var\(--series-2\)', chart.svg)
    tops = [min(float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", bar)) for bar in bars]
    assert tops == pytest.approx(upper["y"], abs=0.1)


def test_values_that_are_no_numbers_are_counted(tmp_path):
    nan = float("nan")
    folder = write_rows(tmp_path / "run", {"train/loss": nan}, {"train/loss": float("inf"), "train/policy_loss": 0.5})
    chart = chart_of(folder, "train/loss")
    assert [(line.label, line.missing, len(line.values)) for line in chart.lines] == [
        ("train/loss", 2, 0),
        ("train/policy_loss", 0, 1),
    ]
    assert "train/loss: 2 not finite" in report(read_runs([folder]))


def test_a_long_run_is_thinned_and_its_range_kept(tmp_path):
    values = np.sin(np.arange(5000))
    folder = write_rows(tmp_path / "run", *({"train/entropy": float(value)} for value in values))
    (line,) = chart_of(folder, "train/entropy").lines
    assert len(line.values) <= 300 and line.low.min() == values.min() and line.high.max() == values.max()
    assert line.values.mean() == pytest.approx(values.mean(), abs=1e-3)


@pytest.mark.parametrize(
    ("values", "unit", "expected"),
    [
        ([0.0, 0.9], "reward", (0.0, 1.05)),  # the whole range of a share
        ([0.0, 0.04], "0 to 1", (0.0, 0.042)),  # a small share on its own range
        ([100.0, 101.0], "s", (99.92, 101.08)),  # far from 0
        ([-1.0, 1.0], "-", (-1.16, 1.16)),
        ([0.0, 0.0], "count", (0.0, 1.0)),
        ([3.0, 3.0], "count", (2.7, 3.3)),
    ],
)
def test_limits(tmp_path, values, unit, expected):
    folder = write_rows(tmp_path / "run", *({"train/entropy": value} for value in values))
    assert limits(chart_of(folder, "train/entropy").lines, unit) == pytest.approx(expected)


def test_the_script_writes_the_page_beside_the_run(tmp_path):
    run = make_run(tmp_path / "sums", steps=2)
    command = [sys.executable, "scripts/report.py", str(run)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith(f"{run / 'report.html'}: 1 run, 0."), done.stderr
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    done = subprocess.run([*command, str(run / "no")], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


@in_a_browser
def test_it_opens_without_network_or_complaint_and_fits_a_phone(tmp_path):
    runs = [make_run(tmp_path / name, seed=seed, ranks=3) for seed, name in enumerate(("sums", "a-name-" * 9))]
    with (runs[0] / "samples.jsonl").open("a") as samples:
        samples.write(json.dumps({"step": 5, "prompt": "?", "response": "9" * 500, "reward": 0.0}) + "\n")
    pages = {tmp_path / "one.html": runs[:1], tmp_path / "two.html": runs}
    for file, folders in pages.items():
        file.write_text(report(read_runs(folders)))
    (tmp_path / "profile").mkdir()
    with page(tmp_path / "profile") as opened:
        for file in pages:
            for width in (390, 1280):
                for dark in (False, True):
                    opened.open(file, width, dark=dark)
                    assert opened.value("document.documentElement.scrollWidth") == width, (file.name, width)
                    background = opened.value("getComputedStyle(document.body).backgroundColor")
                    assert (sum(map(int, re.findall(r"\d+", background))) < 200) == dark, background
            headings = opened.value("[...document.querySelectorAll('h2')].map(each => each.textContent)")
            assert headings == [*SECTIONS, "Config", "Environment"]
            lines = (
                "[...document.querySelectorAll('.chart svg path')].filter(each => each.getBBox().width > 100).length"
            )
            assert opened.value(lines) > 60  # lines and grids are drawn
        _try_pointer_and_filter(opened)
        assert opened.complaints == []
        assert set(opened.requests) <= {"about:blank", *(file.as_uri() for file in pages)}


def _try_pointer_and_filter(opened) -> None:
    """Of the page of two runs: a chart says its values, the others mark the step; the filter hides the rest."""
    opened.value("document.querySelector('#learning').scrollIntoView({behavior: 'instant'})")
    box = "(() => {const box = document.querySelector('#learning .chart svg').getBoundingClientRect();"
    opened.hover(*opened.value(f"{box} return [box.left + box.width / 2, box.top + box.height / 2]}})()"))
    tips = opened.value(
        "[...document.querySelectorAll('.tip')].filter(each => !each.hidden).map(each => each.innerText)"
    )
    assert len(tips) == 1 and re.match(r"step [23]\b", tips[0]) and tips[0].count("mean") == 2, tips
    assert opened.value("document.querySelectorAll('.cross').length") > 25
    count = "document.querySelector('.count').textContent"
    assert opened.value(count) == "49"  # of two runs 6 steps of 4, and one more
    opened.value("(() => {const field = document.querySelector('input'); field.value = '99999';"
                 "field.dispatchEvent(new Event('input'))})()")  # fmt: skip
    assert opened.value(count) == "1"
    assert (
        opened.value("[...document.querySelectorAll('.samples tbody tr')].filter(each => each.offsetHeight).length")
        == 1
    )
