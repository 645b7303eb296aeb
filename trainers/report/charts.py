"""A panel as an SVG for a page: drawn by matplotlib, coloured by the page's own variables, with what the pointer shows.

One picture serves light and dark: its colours are the page's CSS variables. It is readable without scripts; the page's
script reads the data beside it.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from trainers.metrics import Panel
from trainers.report.runs import Run

WIDTH, HEIGHT = 400, 210  # of a picture, in its own units; about as wide as a panel, so that its text has its size
MARGINS = {"left": 46, "right": 10, "top": 8, "bottom": 22}
MAX_POINTS = 300  # of a line: more are drawn as means of several steps, in the band of all of them
MANY_STEPS = 60  # beyond them a stack is an area, since bars would be too narrow

# Stand-ins that matplotlib takes for colours, and what the page calls them.
SERIES = 8
COLOURS = {f"#0000{number:02x}": f"var(--series-{number})" for number in range(1, SERIES + 1)}
GRID, TEXT = "#0001ff", "#0002ff"
COLOURS |= {GRID: "var(--grid)", TEXT: "var(--muted)"}
DASHES: tuple = ((0, ()), (0, (4, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))


@dataclass(frozen=True)
class Line:
    """One metric of one run.

    Attributes:
        label: the metric's name.
        run: the run's name; empty where there is one run.
        colour: 1 to SERIES.
        dash: 0 to 3.
        steps: (points,) int.
        values: (points,) float, finite; none of a metric that never was.
        low, high: (points,) the range that each value is a mean of.
        last: the latest value logged; may be non-finite.
        missing: how many values were not finite.
    """

    label: str
    run: str
    colour: int
    dash: int
    steps: np.ndarray
    values: np.ndarray
    low: np.ndarray
    high: np.ndarray
    last: float
    missing: int


@dataclass(frozen=True)
class Chart:
    """One panel, drawn.

    Attributes:
        panel: what it shows.
        title: of the panel, with the run's name where every run has a chart of its own.
        lines: at least one.
        svg: to stand in a page as it is.
        data: JSON-ready; for the pointer.
    """

    panel: Panel
    title: str
    lines: list[Line]
    svg: str
    data: dict[str, Any]


def charts_of(panel: Panel, runs: Sequence[Run]) -> list[Chart]:
    """The panel's charts: one for all runs, or one a run if it is stacked; none where nothing was logged."""
    span = _span(runs)
    if not panel.stacked or len(runs) == 1:
        lines = [line for index, run in enumerate(runs) for line in _lines(panel, run, index, len(runs) > 1)]
        return [_draw(panel, panel.title, lines, span, None)] if lines else []
    stacks = [(run, _lines(panel, run, 0, False)) for run in runs]
    tops = [
        float(np.sum([line.values for line in on_common_steps(lines)], axis=0).max()) for _, lines in stacks if lines
    ]
    return [_draw(panel, f"{panel.title}, {run.name}", lines, span, max(tops)) for run, lines in stacks if lines]


def _span(runs: Sequence[Run]) -> tuple[int, int]:
    """The first and last step of all runs: the axis of every chart."""
    steps = [int(row["step"]) for run in runs for row in run.rows]
    return min(steps), max(steps)


def _lines(panel: Panel, run: Run, index: int, several: bool) -> list[Line]:
    """The panel's metrics of one run.

    Of one run among several its lines have one colour and differ by their dashes; by itself the other way round.
    """
    lines = []
    for number, name in enumerate(panel.names(run.names)):
        steps, values = run.series(name)
        finite = np.isfinite(values)
        if finite.any() or not panel.stacked:
            colour, dash = (index, number) if several else (number, number // SERIES)
            lines.append(
                Line(
                    name,
                    run.name if several else "",
                    colour % SERIES + 1,
                    dash % len(DASHES),
                    *thinned(steps[finite], values[finite]),
                    last=float(values[-1]),
                    missing=int((~finite).sum()),
                )
            )
    return lines


def thinned(
    steps: np.ndarray, values: np.ndarray, most: int = MAX_POINTS
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """At most `most` points: middle steps of equal runs of points, their means, their least and greatest values.

    Args:
        steps: (points,) int64.
        values: (points,) float64, finite.

    Returns:
        Four times (at most `most`,).

    >>> [of_point.tolist() for of_point in thinned(np.arange(4), np.array([1.0, 3.0, 5.0, 9.0]), most=2)]
    [[0, 2], [2.0, 7.0], [1.0, 5.0], [3.0, 9.0]]
    """
    size = -(-len(steps) // most) or 1
    starts = range(0, len(steps), size)
    parts = [values[start : start + size] for start in starts]
    middles = np.array([steps[start + (len(part) - 1) // 2] for start, part in zip(starts, parts, strict=True)])
    means, low, high = (np.array([kind(part) for part in parts]) for kind in (np.mean, np.min, np.max))
    return middles, means, low, high


def on_common_steps(lines: Sequence[Line]) -> list[Line]:
    """The lines over the steps of all of them, 0 where one was not logged: to be stacked."""
    steps = np.unique(np.concatenate([line.steps for line in lines]))
    stacked = []
    for line in lines:
        values = np.zeros(len(steps))
        values[np.searchsorted(steps, line.steps)] = line.values
        stacked.append(replace(line, steps=steps, values=values, low=values, high=values))
    return stacked


def _draw(panel: Panel, title: str, lines: list[Line], span: tuple[int, int], top: float | None) -> Chart:
    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72)  # 72: pixels are the SVG's own units
    left, bottom = MARGINS["left"] / WIDTH, MARGINS["bottom"] / HEIGHT
    axes = figure.add_axes((left, bottom, 1 - left - MARGINS["right"] / WIDTH, 1 - bottom - MARGINS["top"] / HEIGHT))
    if panel.stacked:
        lines = on_common_steps(lines)
        _stack(axes, lines)
        axes.set_ylim(0, (top or axes.dataLim.y1) * 1.04)
    else:
        for line in lines:
            _line(axes, line)
        axes.set_ylim(*limits(lines, panel.unit))
    pad = 0.6 if panel.stacked and span[1] - span[0] <= MANY_STEPS else 0.02 * (span[1] - span[0])
    axes.set_xlim(span[0] - max(pad, 0.1), span[1] + max(pad, 0.1))
    _style(axes, panel.unit)
    return Chart(panel, title, lines, _svg(figure, title), _data(axes, lines, panel))


def _line(axes: Axes, line: Line) -> None:
    colour = f"#0000{line.colour:02x}"
    few = len(line.steps) <= 40
    if (line.high > line.low).any():
        axes.fill_between(line.steps, line.low, line.high, color=colour, alpha=0.18, linewidth=0)
    look = {"linestyle": DASHES[line.dash], "linewidth": 1.7, "solid_capstyle": "round", "solid_joinstyle": "round"}
    axes.plot(line.steps, line.values, color=colour, marker="o" if few else "", markersize=3, **look)


def _stack(axes: Axes, lines: Sequence[Line]) -> None:
    """Bars on one another where there are few steps, else areas."""
    edges = list(accumulate((line.values for line in lines), initial=np.zeros(len(lines[0].steps))))
    for line, low, high in zip(lines, edges[:-1], edges[1:], strict=True):
        colour = f"#0000{line.colour:02x}"
        if len(line.steps) <= MANY_STEPS:
            axes.bar(line.steps, high - low, bottom=low, width=0.8, color=colour, linewidth=0)
        else:
            axes.fill_between(line.steps, low, high, color=colour, linewidth=0)


def limits(lines: Sequence[Line], unit: str) -> tuple[float, float]:
    """Of the vertical axis: from 0 where the values are not negative and not all far from it, with a little air."""
    low = float(min((line.low.min() for line in lines if len(line.low)), default=0.0))
    high = float(max((line.high.max() for line in lines if len(line.high)), default=0.0))
    if low >= 0 and (low < 0.6 * high or high == 0):
        ceiling = 1.0 if unit in ("0 to 1", "reward") and 0.5 < high <= 1 else high
        return 0.0, ceiling * 1.05 or 1.0
    air = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return low - air, high + air


def _style(axes: Axes, unit: str) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(integer=unit == "count", nbins=4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=11, labelcolor=TEXT, pad=5)


def tick(value: float) -> str:
    """A short number.

    >>> [tick(value) for value in (0.0, 0.25, 1500.0, 20000.0, 2.5e6, 2e-5)]
    ['0', '0.25', '1,500', '20k', '2.5M', '2e-05']
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _data(axes: Axes, lines: Sequence[Line], panel: Panel) -> dict[str, Any]:
    """Where steps and values stand in the picture, and what they are; of a stack the height that a part ends at."""
    (x0, y0), (x1, y1) = axes.transData.transform([(0, 0), (1, 1)])
    edges = list(accumulate(line.values for line in lines)) if panel.stacked else [line.values for line in lines]
    return {
        "x": [round(x1 - x0, 5), round(x0, 2)],
        "top": MARGINS["top"],
        "bottom": HEIGHT - MARGINS["bottom"],
        "unit": "" if panel.unit == "-" else panel.unit,
        "lines": [
            {
                "label": line.label,
                "run": line.run,
                "colour": line.colour,
                "steps": line.steps.tolist(),
                "values": [float(f"{value:.5g}") for value in line.values],
                "y": [round(HEIGHT - (y0 + (y1 - y0) * value), 1) for value in edge],
            }
            for line, edge in zip(lines, edges, strict=True)
        ],
    }


def _svg(figure: Figure, salt: str) -> str:
    """The picture without what a file of its own would need: header, size, style, fonts, ids that others have too.

    Args:
        salt: unlike those of the page's other pictures; of two equal calls the pictures are equal.
    """
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->|font-family: [^;]*; ", "", svg, flags=re.DOTALL
    )
    svg = re.sub(r"<svg[^>]*>", f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">', svg, count=1)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub("|".join(COLOURS), lambda match: COLOURS[match[0]], svg)
    return re.sub(r"\s*\n\s*", "\n", svg)
