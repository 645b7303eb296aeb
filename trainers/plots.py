"""Pictures of finished runs, drawn from their metrics.jsonl."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trainers.dashboard import METRICS_FILE, read_metrics

# Okabe and Ito's palette (2008), which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442",
)  # fmt: skip
GREY, BLACK = "#BBBBBB", "#222222"

# In the order of a step, which is the order of the stack from below.
PHASE_COLOURS = {
    "phase/sync_s": PURPLE,
    "phase/generate_s": BLUE,
    "phase/reward_s": YELLOW,
    "phase/no_grad_s": SKY,
    "phase/optimize_s": ORANGE,
}
SPARE_COLOURS = (GREEN, VERMILION)  # of phases with other names
SEED_COLOURS = (ORANGE, GREEN, PURPLE, SKY, VERMILION, YELLOW)
MANY_STEPS = 100  # beyond them single steps are too narrow for marks and gaps
RUNNING_STEPS = 5  # of the running mean: the same five as the summary's first and last steps


def plot_run(folder: Path | str) -> list[Path]:
    """Draw one run's reward.png and phases.png into its folder.

    reward.png: the mean reward of each step, its running mean over the last five, and eval/accuracy where it was
    measured. phases.png: the generated tokens per second of the generate phase, and below it the seconds of each step
    stacked by phase. A picture whose figures were never logged is left out.

    Returns:
        The files written.

    Raises:
        ValueError: if the folder holds no metrics.
    """
    folder = Path(folder)
    rows = _rows_of(folder)
    written = []
    if any("reward/mean" in row for row in rows):
        written.append(_save(_reward_figure(rows, folder.name), folder / "reward.png"))
    if any(name.startswith("phase/") for row in rows for name in row):
        written.append(_save(_phases_figure(rows, folder.name), folder / "phases.png"))
    return written


def _reward_figure(rows: list[dict[str, float]], title: str) -> Figure:
    figure, axes = _figure("step", "reward")
    axes.set_title(title, loc="left", fontsize=10)
    steps, rewards = _series(rows, "reward/mean")
    axes.plot(steps, rewards, "o", color=SKY, markersize=4, label="mean of a step")
    axes.plot(
        steps,
        running_mean(rewards, RUNNING_STEPS),
        color=BLUE,
        linewidth=2.2,
        label=f"mean of the last {RUNNING_STEPS} steps",
    )
    steps, accuracy = _series(rows, "eval/accuracy")
    if len(steps):
        axes.plot(steps, accuracy, "D--", color=VERMILION, markersize=6, linewidth=1, label="accuracy in evaluation")
    _fit_reward_axis(axes)
    _legend(axes)
    return figure


def _phases_figure(rows: list[dict[str, float]], title: str) -> Figure:
    figure = Figure(figsize=(7.5, 5.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    _style(upper, "", "generated tokens/s\nin generate")
    _style(lower, "step", "seconds of a step")
    upper.set_title(title, loc="left", fontsize=10)
    steps, rates = _series(rows, "rollout/generated_tokens_per_s")
    upper.plot(steps, rates, color=BLACK, linewidth=1.5, marker="." if len(steps) <= MANY_STEPS else "")
    upper.set_ylim(0, max(rates, default=0.0) * 1.15 or 1.0)

    bottom = np.zeros(len(rows))
    few = len(rows) <= MANY_STEPS  # gaps between many bars are narrower than a pixel and come out as stripes
    for name, seconds, colour in _phase_bars(rows):
        label = name.removeprefix("phase/").removesuffix("_s")
        place = dict(bottom=bottom, width=0.88 if few else 1.0, linewidth=0, antialiased=few)
        lower.bar([row["step"] for row in rows], seconds, color=colour, label=label, **place)
        bottom = bottom + seconds
    lower.set_ylim(0, float(bottom.max()) * 1.05 or 1.0)
    # Outside, since stacked bars leave no free corner.
    handles, labels = lower.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    return figure


def _phase_bars(rows: list[dict[str, float]]) -> list[tuple[str, np.ndarray, str]]:
    """Name, seconds (rows,) and colour of each phase, in the order of the stack."""
    logged = dict.fromkeys(name for row in rows for name in row if name.startswith("phase/"))
    spare = [name for name in logged if name not in PHASE_COLOURS]
    colours = PHASE_COLOURS | {name: SPARE_COLOURS[i % len(SPARE_COLOURS)] for i, name in enumerate(spare)}
    bars = [
        (name, np.array([row.get(name, 0.0) for row in rows]), colour)
        for name, colour in colours.items()
        if name in logged
    ]
    # What the phases do not account for, where the step as a whole was timed too.
    whole = np.array([row.get("step/seconds", 0.0) for row in rows])
    rest = np.clip(whole - sum(seconds for _, seconds, _ in bars), 0.0, None)
    if rest.sum() > 0.01 * whole.sum():
        bars.append(("phase/other_s", rest, GREY))
    return bars


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and the window - 1 before it, of fewer at the start: (steps,) float of (steps,) float.

    >>> running_mean(np.array([1.0, 3.0, 5.0, 7.0]), window=2).tolist()
    [1.0, 2.0, 4.0, 6.0]
    """
    return np.array([np.mean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)])


def _rows_of(folder: Path) -> list[dict[str, float]]:
    rows = read_metrics(folder)
    if not rows:
        raise ValueError(f"{folder / METRICS_FILE} has no metrics; give the folder of a run that finished a step")
    return rows


def _series(rows: list[dict[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of one metric, each (rows that have it,)."""
    points = [(row["step"], row[name]) for row in rows if np.isfinite(row.get(name, np.nan))]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps), np.array(values, dtype=float)


def _figure(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """A figure of its own, outside pyplot: it needs no display and leaves no global state."""
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    _style(axes, xlabel, ylabel)
    return figure, axes


def _style(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)


def _fit_reward_axis(axes: Axes) -> None:
    """Rewards of 0 to 1 are drawn on that whole range, so that pictures compare; others on their own."""
    low, high = axes.dataLim.intervaly
    if low >= 0.0 and high <= 1.0:
        axes.set_ylim(0.0, 1.02)


def _legend(axes: Axes) -> None:
    axes.legend(loc="best", frameon=False, fontsize=9)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path
