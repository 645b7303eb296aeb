"""The picture of a benchmark: tokens a second over the batch, a bar a system, with the spread and the limit."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from scripts.bench.plan import LABELS, limit_tokens_per_s
from scripts.bench.report import Row
from trainers.plots import BLACK, BLUE, GREY, ORANGE, SKY

COLOURS = {"stock_sync": GREY, "stock_async": ORANGE, "ours_sync": SKY, "ours_async": BLUE}
FIGURES = {
    "generated_tokens_per_s": "generated tokens/s\nof the whole phase",
    "decode_tokens_per_s": "decode tokens/s\nafter the prefill",
}
GROUP_WIDTH = 0.84  # of the space of one batch
WIDTH_OF_A_GROUP = 1.15  # inches
MANY_GROUPS = 2
LIMIT = "limit: device never idle"


def plot_rates(rows: Sequence[Row], title: str, path: Path | str) -> Path:
    """Draw rows of `make_rows`: above the whole phase, below its decode steps, one column of panels a set of batches.

    A bar is the median of the repeats, its whisker the least and the greatest, the line over a group the limit where
    it is known.

    Returns:
        The PNG.
    """
    columns = _columns(rows)
    groups = sum(len({row["batch"] for row in column}) for column in columns)
    width = max(7.5, 1.5 + WIDTH_OF_A_GROUP * groups)
    figure = Figure(figsize=(width, 6.2), layout="constrained")
    panels = figure.subplots(len(FIGURES), len(columns), squeeze=False)
    for line, (name, label) in enumerate(FIGURES.items()):
        for place, column in enumerate(columns):
            axes = panels[line][place]
            _draw(axes, column, name)
            axes.set_ylabel(label if place == 0 else "")
            axes.set_xlabel("sequences in the batch" if line == len(FIGURES) - 1 else "")
    if len(columns) > 1:
        for axes, column in zip(panels[0], columns, strict=True):
            axes.set_title(f"{column[0]['step_ms']:g} ms a step", fontsize=10)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    handles, labels = panels[0][0].get_legend_handles_labels()
    shown = sorted(zip(labels, handles, strict=True), key=lambda pair: pair[0] == LIMIT)  # the systems first
    # Outside, since bars and whiskers leave no corner that is free for all data.
    labels, handles = zip(*shown, strict=True)
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    return Path(path)


def _columns(rows: Sequence[Row]) -> list[list[Row]]:
    """One column if every batch has one step time (paired), else one a step time."""
    step_times = list(dict.fromkeys(row["step_ms"] for row in rows))
    paired = len({(row["batch"], row["step_ms"]) for row in rows}) == len({row["batch"] for row in rows})
    return [list(rows)] if paired else [[row for row in rows if row["step_ms"] == step] for step in step_times]


def _draw(axes: Axes, rows: Sequence[Row], name: str) -> None:
    """One panel of grouped bars."""
    batches = sorted({row["batch"] for row in rows})
    systems = list(dict.fromkeys(row["system"] for row in rows))
    width = GROUP_WIDTH / len(systems)
    for index, system in enumerate(systems):
        own = [row for row in rows if row["system"] == system and row[name] is not None]
        places = [batches.index(row["batch"]) + (index - (len(systems) - 1) / 2) * width for row in own]
        middle = [row[name] for row in own]
        whiskers = [[row[name] - row[f"{name}_min"] for row in own], [row[f"{name}_max"] - row[name] for row in own]]
        axes.bar(
            places,
            middle,
            width * 0.92,
            color=COLOURS.get(system, BLACK),
            label=LABELS.get(system, system),
            yerr=whiskers,
            error_kw={"elinewidth": 1.2, "capsize": 2.5, "ecolor": BLACK},
        )
    limits = {row["batch"]: limit_tokens_per_s(row["batch"], row["step_ms"]) for row in rows}
    known = [(batches.index(batch), limit) for batch, limit in limits.items() if limit is not None]
    if known:
        middles, heights = zip(*known, strict=True)
        left, right = ([middle + side * GROUP_WIDTH / 2 for middle in middles] for side in (-1, 1))
        axes.hlines(heights, left, right, color=BLACK, linestyle="--", linewidth=1.4, label=LIMIT)
    axes.set_xticks(range(len(batches)), [_batch_label(rows, batch) for batch in batches])
    margin = max(0.5, (MANY_GROUPS - len(batches) + 1) / 2)  # few groups would become slabs
    axes.set_xlim(-margin, len(batches) - 1 + margin)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)


def _batch_label(rows: Sequence[Row], batch: int) -> str:
    """The batch, and its step time where the batches of a panel have different ones."""
    step_ms = next(row["step_ms"] for row in rows if row["batch"] == batch)
    return str(batch) if len({row["step_ms"] for row in rows}) == 1 else f"{batch}\n{step_ms:g} ms a step"
