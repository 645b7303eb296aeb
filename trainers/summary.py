"""What the console shows at the end of a run: a table of its first and last steps, made of metrics.jsonl."""

import math
from collections.abc import Sequence
from statistics import fmean, median

MOST_STEPS = 5  # that a column is the mean of
Row = dict[str, float]

FIGURES = (
    ("reward", "reward/mean", "{:.3f}"),
    ("response tokens", "rollout/response_tokens_mean", "{:,.0f}"),
    ("generated tokens/s", "rollout/generated_tokens_per_s", "{:,.0f}"),
    ("seconds a step", "step/seconds", "{:.1f}"),
)


def summary(rows: Sequence[Row], total_steps: int, places: Sequence[tuple[str, str]]) -> str:
    """A table in plain text.

    Args:
        rows: of metrics.jsonl, in order of steps.
        total_steps: that the run was to have; 0 of an evaluation alone.
        places: names and where to find it, such as ("files", "runs/x"), for below the table.

    >>> rows = [{"step": 0, "reward/mean": 0.25, "step/seconds": 30.0}, {"step": 1, "reward/mean": 0.5}]
    >>> print(summary(rows, 2, [("files", "runs/x")]))
      2 of 2 steps in 0.5 min      first    last  median
      reward                       0.250   0.500   0.375
      seconds a step                30.0    30.0    30.0
      files  runs/x
    """
    steps = [row for row in rows if row["step"] < total_steps]
    lines = []
    if steps:
        minutes = sum(_column(steps, "step/seconds")) / 60
        count = columns_of(len(steps))
        heads = (f"first {count}", f"last {count}") if count > 1 else ("first", "last")
        lines.append(_line(f"{len(steps)} of {total_steps} steps in {minutes:.1f} min", (*heads, "median")))
        lines += [_of_figure(name, steps, key, form) for name, key, form in FIGURES if _column(steps, key)]
        lines += [_of_figure(f"  {key[6:-2]}", steps, key, "{:.1f}") for key in _longest_phases(steps)]
    elif total_steps:
        lines.append(f"0 of {total_steps} steps")
    if accuracy := _column(rows, "eval/accuracy"):
        change = f"{accuracy[0]:.3f} -> {accuracy[-1]:.3f}" if len(accuracy) > 1 else f"{accuracy[0]:.3f}"
        places = [("accuracy", f"{change}  (on held-out prompts, greedy)"), *places]
    width = max((len(name) for name, _ in places), default=0)
    lines += [f"{name:<{width}}  {text}" for name, text in places]
    return "\n".join(f"  {line}" for line in lines)


def columns_of(steps: int) -> int:
    """How many steps the first and the last column are each a mean of: not of the same ones, if there are two.

    >>> [columns_of(steps) for steps in (1, 2, 5, 16)]
    [1, 1, 2, 5]
    """
    return max(1, min(MOST_STEPS, steps // 2))


def _of_figure(name: str, steps: Sequence[Row], key: str, form: str) -> str:
    values = _column(steps, key)
    count = columns_of(len(values))
    return _line(name, [form.format(each) for each in (fmean(values[:count]), fmean(values[-count:]), median(values))])


def _longest_phases(steps: Sequence[Row]) -> list[str]:
    """The phases that take a twentieth of the run's time, the longest first."""
    sums = {key: sum(_column(steps, key)) for row in steps for key in row if key.startswith("phase/")}
    whole = sum(sums.values())
    return sorted((key for key, seconds in sums.items() if seconds >= whole / 20), key=lambda key: -sums[key])


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:<26}" + "".join(f"{cell:>8}" for cell in cells)


def _column(rows: Sequence[Row], name: str) -> list[float]:
    return [row[name] for row in rows if name in row and math.isfinite(row[name])]
