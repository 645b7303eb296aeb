"""How far the run is: a bar on a terminal, elsewhere one plain line a step."""

import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from trainers.console import has_colours, is_terminal

TICK_S = 1.0
RECENT_STEPS = 5  # whose mean length the time that is left is reckoned with


class Progress:
    """Shows steps and figures on stderr; rank 0 alone makes one.

    The bar is for a person: drawn if stdout and stderr are both a terminal. Otherwise somebody keeps the output, and
    gets lines.

    Args:
        total_steps: that the run is to have; 0 of an evaluation alone.
        done: of them, in a run that goes on.
    """

    def __init__(self, total_steps: int, done: int = 0) -> None:
        self._total_steps = total_steps
        self._bar: Bar | None = None
        if is_terminal(sys.stderr) and is_terminal(sys.stdout):
            self._bar = Bar(total_steps, done)

    def phase(self, name: str) -> None:
        """Show that the run is in this phase now."""
        if self._bar is not None:
            self._bar.phase(name)

    def show(self, step: int, row: Mapping[str, float]) -> None:
        """Show the figures of a step that has ended; `step` is total_steps for what came after the last one."""
        figures = shown_figures(row)
        if self._bar is not None:
            self._bar.show(min(step + 1, self._total_steps), figures, row.get("step/seconds"))
            return
        if "step/seconds" in row:
            figures.append(f"{row['step/seconds']:.1f} s")
        where = f"step {step + 1}/{self._total_steps}" if step < self._total_steps else "in the end"
        print(f"{where}: {', '.join(figures)}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands; nothing is drawn afterwards."""
        if self._bar is not None:
            self._bar.end()


class Bar(tqdm):
    """Steps done, the last step's figures, the phase and since when, the time that has gone and that is left.

    A thread draws it anew every TICK_S: a phase may take minutes, and whoever looks shall see that time passes.
    """

    monitor_interval = 0  # tqdm's own thread, which redraws bars that nobody updates

    def __init__(self, total_steps: int, done: int) -> None:
        self._figures: list[str] = []
        self._phase: tuple[str, float] | None = None
        self._seconds: list[float] = []
        self._step_began = time.perf_counter()
        self._closing = threading.Event()
        super().__init__(
            total=total_steps,
            initial=done,
            file=sys.stderr,
            bar_format=("{n_fmt}/{total_fmt} steps |{bar}| " if total_steps else "") + "{shown}{elapsed}{left}",
            dynamic_ncols=True,
            colour="green" if has_colours(sys.stderr) else None,
        )
        self._ticking = threading.Thread(target=self._tick, name="progress-bar", daemon=True)
        self._ticking.start()

    @property
    def format_dict(self) -> dict[str, Any]:
        """tqdm's, with the figures, the phase and the time that is left."""
        now = time.perf_counter()
        phase = [f"{self._phase[0]} {now - self._phase[1]:.0f} s"] if self._phase else []
        shown = "".join(f"{each}, " for each in [*self._figures, *phase])
        return super().format_dict | {"shown": shown, "left": self._left(now)}

    def phase(self, name: str) -> None:
        """Show the phase that begins now, and its seconds from now on."""
        self._phase = (name, time.perf_counter())
        self.refresh()

    def show(self, done: int, figures: list[str], seconds: float | None) -> None:
        """Move on to `done` steps; `seconds` is the last one's, None where it is unknown."""
        self._figures, self._phase = figures, None
        self._step_began = time.perf_counter()
        if seconds is not None:
            self._seconds = [*self._seconds, seconds][-RECENT_STEPS:]
        self.n = done
        self.refresh()

    def end(self) -> None:
        """Leave the bar as it stands, and end its thread."""
        self._closing.set()
        self._ticking.join()
        self._phase = None
        self.close()

    def _left(self, now: float) -> str:
        if not self._seconds or self.n == self.total:
            return ""
        mean = sum(self._seconds) / len(self._seconds)
        seconds = mean * (self.total - self.n) - (now - self._step_began)
        return f", {self.format_interval(round(max(0.0, seconds)))} left"

    def _tick(self) -> None:
        while not self._closing.wait(TICK_S):
            self.refresh()


def shown_figures(row: Mapping[str, float]) -> list[str]:
    """What is shown of a step's metrics.

    >>> shown_figures({"reward/mean": 0.25, "rollout/generated_tokens_per_s": 1234.5})
    ['reward 0.250', '1,234 tokens/s']
    """
    formats = {
        "reward/mean": "reward {:.3f}",
        "rollout/generated_tokens_per_s": "{:,.0f} tokens/s",
        "eval/accuracy": "accuracy {:.3f}",
    }
    return [form.format(row[name]) for name, form in formats.items() if name in row]
