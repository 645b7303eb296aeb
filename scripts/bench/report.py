"""From the figures of single turns to rows, paired ratios and tables. Plain functions of plain data; no vLLM here.

A record is one counted turn: {system, batch, step_ms, repeat, seconds, generated_tokens, decode_seconds,
decode_tokens} and, of our systems, OUR_METRICS.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from scripts.bench.plan import LABELS, limit_tokens_per_s

Record = dict[str, Any]
Row = dict[str, Any]

# As in docs/metrics.md, less the "rollout/".
OUR_METRICS = ("host_gap_fraction", "schedule_ms", "launch_ms", "wait_ms", "update_ms", "decode_steps", "preemptions")
PAIRS = (
    ("ours_async", "stock_sync"),
    ("ours_async", "stock_async"),
    ("ours_async", "ours_sync"),
    ("ours_async", "unchecked_async"),
)


def decode_split(ends: np.ndarray, scheduled_tokens: np.ndarray, sequences: np.ndarray) -> tuple[float, int] | None:
    """The seconds and tokens of a phase after its prefill: of the steps that decode, and of nothing else.

    The clock starts when the last step that processed prompt tokens was taken in, and ends when the last step was. A
    step has prompt tokens if it processes more tokens than sequences; the first one always has. (A later step in which
    a prompt's last token stands for itself costs what decoding costs, and gives its sequence a token: it counts.)

    Args:
        ends: (steps,) seconds, when each step's output had been taken in; NaN where it never was.
        scheduled_tokens: (steps,) tokens that each step processed; 0 for the empty steps of an asynchronous scheduler.
        sequences: (steps,) that took part in it; each gets one token in a step that decodes.

    Returns:
        Seconds and tokens, or None where no step only decoded.

    >>> ends, tokens = np.array([1.0, 2.0, 2.5, 3.0, 3.1]), np.array([90, 31, 2, 2, 0])
    >>> decode_split(ends, tokens, np.array([2, 2, 2, 2, 0]))  # the prefill took two steps
    (1.0, 4)
    """
    ran = np.nonzero((scheduled_tokens > 0) & ~np.isnan(ends))[0]
    if not len(ran):
        return None
    prefill = scheduled_tokens[ran] > sequences[ran]
    prefill[0] = True
    last = int(np.nonzero(prefill)[0][-1])
    decode = ran[last + 1 :]
    if not len(decode):
        return None
    return float(ends[decode[-1]] - ends[ran[last]]), int(sequences[decode].sum())


def make_rows(records: Sequence[Record], tensor_parallel_size: int, about: dict[str, dict[str, Any]]) -> list[Row]:
    """One row a system, batch and step time, in the order of the first record of each.

    Args:
        records: every counted turn.
        about: by system: its versions and device, and what runs in it.

    Returns:
        Rows with median, least and greatest rates over the repeats, and every repeat's own figures under "turns".
    """
    return [
        _row(own, tensor_parallel_size, about[own[0]["system"]])
        for own in _grouped(records, lambda record: (record["step_ms"], record["batch"], record["system"]))
    ]


def _row(own: list[Record], tensor_parallel_size: int, about: dict[str, Any]) -> Row:
    first = own[0]
    limit = limit_tokens_per_s(first["batch"], first["step_ms"])
    seconds = [record["seconds"] for record in own]
    rates = [phase_rate(record) for record in own]
    decode_rates = [rate for record in own if (rate := decode_rate(record)) is not None]
    row = {name: first[name] for name in ("system", "batch", "step_ms")}
    row |= {"tensor_parallel_size": tensor_parallel_size, "repeats": len(own)}
    row |= spread("seconds", seconds) | spread("generated_tokens_per_s", rates)
    row |= spread("decode_tokens_per_s", decode_rates)
    for name, rate in (("", row["generated_tokens_per_s"]), ("decode_", row["decode_tokens_per_s"])):
        row[f"{name}fraction_of_limit"] = None if limit is None or rate is None else rate / limit
    for name in OUR_METRICS:
        values = [record[name] for record in own if record.get(name) is not None]
        if values:
            row[name] = median(values)
    return row | {name: about[name] for name in ("versions", "device", "runs")} | {"turns": list(own)}


def make_ratios(records: Sequence[Record]) -> list[Row]:
    """How much faster one system is than another, paired repeat by repeat: both ran within minutes of each other.

    Returns:
        For each pair, batch and step time that has both: median, least and greatest ratio of the tokens/s of the whole
        phase, and of decoding (decode_*; None where it was not seen).
    """
    ratios = []
    for own in _grouped(records, lambda record: (record["step_ms"], record["batch"])):
        of = {(record["system"], record["repeat"]): record for record in own}
        for numerator, denominator in PAIRS:
            repeats = [
                r
                for r in sorted({record["repeat"] for record in own})
                if {(numerator, r), (denominator, r)} <= of.keys()
            ]
            pairs = [(of[numerator, repeat], of[denominator, repeat]) for repeat in repeats]
            if not pairs:
                continue
            row = {name: own[0][name] for name in ("batch", "step_ms")}
            row |= {"numerator": numerator, "denominator": denominator, "repeats": len(pairs)}
            row |= spread("phase_ratio", _ratios(pairs, phase_rate)) | spread(
                "decode_ratio", _ratios(pairs, decode_rate)
            )
            ratios.append(row)
    return ratios


def _ratios(pairs: Iterable[tuple[Record, Record]], rate: Callable[[Record], float | None]) -> list[float]:
    rates = [(rate(left), rate(right)) for left, right in pairs]
    return [left / right for left, right in rates if left is not None and right is not None]


def phase_rate(record: Record) -> float:
    """Generated tokens a second of the whole phase, prefill included."""
    return record["generated_tokens"] / record["seconds"]


def decode_rate(record: Record) -> float | None:
    """Generated tokens a second after the prefill; None where no step only decoded."""
    return record["decode_tokens"] / record["decode_seconds"] if record["decode_seconds"] else None


def spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Median, least and greatest, under a name; None where there is nothing.

    >>> spread("seconds", [3.0, 1.0, 2.0])
    {'seconds': 2.0, 'seconds_min': 1.0, 'seconds_max': 3.0}
    """
    if not values:
        return {name: None, f"{name}_min": None, f"{name}_max": None}
    return {name: median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def rates_table(rows: Sequence[Row]) -> str:
    """The rates as a Markdown table; the limit's and our metrics' columns only where a row has them."""
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("batch", lambda row: str(row["batch"])),
        ("step ms", lambda row: _number(row["step_ms"], "g")),
        ("system", lambda row: LABELS[row["system"]]),
        ("tokens/s", lambda row: _spread_text(row, "generated_tokens_per_s", ".0f")),
        ("of limit", lambda row: _number(row["fraction_of_limit"], ".3f")),
        ("decode tokens/s", lambda row: _spread_text(row, "decode_tokens_per_s", ".0f")),
        ("of limit", lambda row: _number(row["decode_fraction_of_limit"], ".3f")),
        ("gap", lambda row: _number(row.get("host_gap_fraction"), ".3f")),
    ]
    for name in ("schedule", "launch", "wait", "update"):
        columns.append((f"{name} ms", partial(_milliseconds, f"{name}_ms")))
    return markdown([title for title, _ in columns], [[cell(row) for _, cell in columns] for row in rows])


def ratios_table(ratios: Sequence[Row]) -> str:
    """The paired ratios as a Markdown table."""
    titles = ["batch", "step ms", "ratio of tokens/s", "whole phase", "decode"]
    lines = [
        [
            str(row["batch"]),
            _number(row["step_ms"], "g"),
            f"{row['numerator']} / {row['denominator']}",
            _spread_text(row, "phase_ratio", ".3f"),
            _spread_text(row, "decode_ratio", ".3f"),
        ]
        for row in ratios
    ]
    return markdown(titles, lines)


def markdown(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A padded Markdown table, numbers to the right, without the columns that have nothing in them.

    >>> print(markdown(["a", "b", "c"], [["1", "", "one"], ["10", "", "two"]]))
    |  a | c   |
    |---:|:----|
    |  1 | one |
    | 10 | two |
    """
    columns = [(title, cells) for title, cells in zip(titles, zip(*lines, strict=True), strict=True) if any(cells)]
    drawn = []
    for title, cells in columns:
        width = max(map(len, (title, *cells)))
        right = all(cell[:1].isdigit() or not cell for cell in cells)
        place = str.rjust if right else str.ljust
        rule = "-" * (width + 1) + ":" if right else ":" + "-" * (width + 1)
        drawn.append([f" {place(title, width)} ", rule, *(f" {place(cell, width)} " for cell in cells)])
    return "\n".join("|" + "|".join(line) + "|" for line in zip(*drawn, strict=True))


def _spread_text(row: Row, name: str, form: str) -> str:
    if row[name] is None:
        return ""
    middle, least, greatest = (format(row[key], form) for key in (name, f"{name}_min", f"{name}_max"))
    return middle if row["repeats"] == 1 else f"{middle} [{least} .. {greatest}]"


def _milliseconds(name: str, row: Row) -> str:
    return _number(row.get(name), ".2f")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _grouped(records: Sequence[Record], key: Callable[[Record], Any]) -> list[list[Record]]:
    """The records of each key, keys in the order of their first record."""
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return list(groups.values())
