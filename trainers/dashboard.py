"""The eyes on a run: metrics.jsonl, wandb, a progress bar, and a summary at the end. Rank 0 alone writes.

Names and meanings of the metrics: docs/metrics.md, and metrics.toml beside this file.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO, cast

import psutil
import yaml

from trainers.config import RunConfig, WandbConfig
from trainers.errors import ConfigError
from trainers.metrics import metric_of
from trainers.progress import Progress
from trainers.summary import summary

if TYPE_CHECKING:
    from wandb import Run, Settings

Mode = Literal["auto", "online", "offline", "disabled"]
StartMode = Literal["online", "offline", "disabled"]

METRICS_FILE = "metrics.jsonl"
SAMPLE_TABLES = 50  # of a run at most: each is a file of its own on wandb
WANDB_INIT_TIMEOUT_S = 30.0


class Dashboard:
    """Shows and records one run's metrics.

    Every rank makes one and calls the same methods; `is_main` is True on rank 0 alone. Elsewhere only the phases are
    timed.

    - metrics.jsonl: one JSON object a step, written out at once, so that a killed run leaves all its steps. JSON has
      no non-finite numbers: they stand as the strings "NaN", "Infinity" and "-Infinity", which float() and
      `read_metrics` read. A resumed run appends; of two lines of one step the later counts.
    - wandb: the same names over the axis `step`, files in the run folder. Mode as in `wandb_mode`. If mode auto finds
      a login but no server, the run goes on offline.
    - On a terminal a progress bar, elsewhere one plain line a step, both to stderr (trainers/progress.py); neither if
      run_config.progress is False.

    Args:
        folder: of the run; its config.yaml becomes wandb's config.
        wandb_config: mode, project, entity, group, tags.
        run_config: progress.
        total_steps: that the run is to have, for the bar; 0 of an evaluation alone.
        is_main: True on rank 0.
        wandb_id: of the run on wandb that goes on; None starts one.
        done: steps of a run that goes on, for the bar.

    Raises:
        ConfigError: if wandb.mode is online and there is no login.

    Example:
        with Dashboard(folder, config.wandb, config.run, config.ppo.steps, rank == 0) as dashboard:
            for step in range(config.ppo.steps):
                with dashboard.phase("generate"):
                    ...
                dashboard.log(step, {"reward/mean": 0.25})
    """

    def __init__(
        self,
        folder: Path | str,
        wandb_config: WandbConfig,
        run_config: RunConfig,
        total_steps: int,
        is_main: bool,
        wandb_id: str | None = None,
        done: int = 0,
    ) -> None:
        self.folder = Path(folder)
        self.phase_seconds: dict[str, float] = {}
        """Seconds of each phase since the last `log`, this rank's."""
        self._total_steps = total_steps
        self._is_main = is_main
        self._samples: list[Mapping[str, Any]] = []  # since the last table of them
        self._defined: set[str] = set()  # names that wandb has been told about
        self._progress: Progress | None = None
        self._wandb: Run | None = None
        if not is_main:
            return
        self._wandb = _start_wandb(self.folder, wandb_config, wandb_id)
        self._file = _open_to_append(self.folder / METRICS_FILE)
        if run_config.progress:
            self._progress = Progress(total_steps, done)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time one phase of a step: the seconds go into the next `log` as phase/NAME_s, added up if it comes twice.

        Wall-clock time of the host: on a GPU, work that is only queued is charged to the phase that waits for it.
        """
        if self._progress is not None:
            self._progress.phase(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phase_seconds[name] = self.phase_seconds.get(name, 0.0) + time.perf_counter() - start

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record one step's metrics and the phases since the last call.

        Args:
            step: of the run, from 0; total_steps for what was measured after the last one.
            metrics: numbers by their names in docs/metrics.md; already reduced over ranks, as rank 0 has them.
        """
        phases = {f"phase/{name}_s": seconds for name, seconds in self.phase_seconds.items()}
        self.phase_seconds = {}
        if not self._is_main:
            return
        row = {
            name: value if isinstance(value, int) else float(value) for name, value in (phases | dict(metrics)).items()
        }
        self._file.write(to_json_line(step, row))
        self._file.flush()
        if self._wandb is not None:
            self._define(row)
            self._wandb.log({"step": step, **row})
        if self._progress is not None:
            self._progress.show(step, row)

    def _define(self, names: Iterable[str]) -> None:
        """Tell wandb of each metric, before it first sees it, over what it is drawn and what to keep of its steps."""
        assert self._wandb is not None
        for name in names:
            if name not in self._defined and (metric := metric_of(name)) is not None:
                self._wandb.define_metric(name, step_metric="step", summary=metric.summary)
            self._defined.add(name)

    def log_table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show rows that are no numbers, such as samples, as one table in wandb; nothing is done without wandb.

        Args:
            step: of the run, from 0.
            name: of the table.
            rows: at least one; all with the same columns. Numbers stay numbers, the rest becomes text.
        """
        if self._wandb is None:
            return
        import wandb

        data = [[value if isinstance(value, int | float) else str(value) for value in row.values()] for row in rows]
        self._wandb.log({"step": step, name: wandb.Table(columns=list(rows[0]), data=data)})

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show what was said in training as tables `samples` in wandb: none is lost, and a long run has 50 tables.

        Args:
            step: of the run, from 0.
            rows: of this step, as for `log_table`.
        """
        self._samples += rows
        steps_a_table = math.ceil(self._total_steps / SAMPLE_TABLES)
        if self._samples and ((step + 1) % steps_a_table == 0 or step + 1 == self._total_steps):
            self.log_table(step, "samples", self._samples)
            self._samples = []

    @property
    def wandb_id(self) -> str | None:
        """Of the run on wandb, to go on with it; None without, and elsewhere than on rank 0."""
        return None if self._wandb is None else self._wandb.id

    def close(self, failed: bool = False) -> None:
        """End the bar and wandb's run and print the summary; a second call does nothing.

        Args:
            failed: True marks wandb's run as failed.
        """
        if not self._is_main or self._file.closed:
            return
        self._file.close()
        if self._progress is not None:
            self._progress.close()
        try:
            if self._wandb is not None:
                _stop_wandb(self._wandb, failed)
        finally:
            print(self.summary(), flush=True)

    def __enter__(self) -> "Dashboard":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def summary(self) -> str:
        """A table of the whole run, from metrics.jsonl, and where the files are."""
        places = [("files", str(self.folder))]
        if self._wandb is not None:
            places.append(("wandb", self._wandb.url or f"offline; to upload: wandb sync {_sync_folder(self._wandb)}"))
        return summary(read_metrics(self.folder), self._total_steps, places)


def to_json_line(step: int, metrics: Mapping[str, float]) -> str:
    """One line of metrics.jsonl.

    >>> to_json_line(3, {"reward/mean": 0.5, "train/loss": float("nan")})
    '{"step": 3, "reward/mean": 0.5, "train/loss": "NaN"}\\n'
    """
    row = {name: value if math.isfinite(value) else json.dumps(value) for name, value in metrics.items()}
    return json.dumps({"step": step, **row}, allow_nan=False) + "\n"


def read_metrics(folder: Path | str) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl, in order of steps; "step" is one of the keys.

    Of two rows of one step the later counts (a resumed run). A line that a crash cut short is left out. An empty list
    if the run logged nothing.
    """
    file = Path(folder) / METRICS_FILE
    rows: dict[int, dict[str, float]] = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["step"]] = {name: float(value) if isinstance(value, str) else value for name, value in row.items()}
    return [rows[step] for step in sorted(rows)]


def memory_metrics() -> dict[str, float]:
    """Memory in use now, in GiB (2**30 bytes), of this rank; one rank's figures, not a sum.

    memory/rss_gib: resident memory of this process (trainer and engine; pages shared with other processes included).
    memory/device_gib: in use on this rank's GPU by all processes; absent without one.

    >>> 0 < memory_metrics()["memory/rss_gib"] < 1000
    True
    """
    import torch

    metrics = {"memory/rss_gib": psutil.Process().memory_info().rss / 2**30}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        metrics["memory/device_gib"] = (total - free) / 2**30
    return metrics


def wandb_mode(mode: Mode) -> StartMode:
    """What wandb.mode comes to on this machine, without asking anybody anything.

    auto follows WANDB_MODE if that is set, else it is online where wandb finds a login (WANDB_API_KEY, or what
    `wandb login` left behind) and offline elsewhere. `disabled` imports no wandb.

    Raises:
        ConfigError: if mode is online and there is no login.
    """
    if mode == "auto":
        chosen = os.environ.get("WANDB_MODE")
        if chosen in ("online", "offline", "disabled"):
            mode = cast(Mode, chosen)
    if mode in ("offline", "disabled"):
        return cast(StartMode, mode)
    if _is_logged_in():
        return "online"
    if mode == "online":
        raise ConfigError(
            "wandb.mode is online, but wandb has no login here: run `wandb login`, set WANDB_API_KEY, "
            "or set wandb.mode to auto, offline or disabled"
        )
    return "offline"


def _is_logged_in() -> bool:
    import wandb

    wandb.setup(_quiet_settings())
    return wandb.login(prompt=False, verify=False)  # reads what is stored; no request, no question


def _start_wandb(folder: Path, config: WandbConfig, run_id: str | None) -> "Run | None":
    mode = wandb_mode(config.mode)
    if mode == "disabled":
        return None
    if mode == "offline":
        # Offline shall mean no network at all: wandb's own crash reports look their server up otherwise.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    wandb.setup(_quiet_settings())  # a run's own settings do not quiet what is said outside of it

    def start(mode: Literal["online", "offline"]) -> "Run":
        run = wandb.init(
            mode=mode,
            project=config.project,
            entity=config.entity,
            group=config.group,
            tags=config.tags,
            name=folder.name,
            id=run_id,
            # Offline there is nobody to ask: the id alone joins the two records when they are uploaded.
            resume="allow" if run_id is not None and mode == "online" else None,
            dir=folder,
            config=_config_of(folder),
            settings=_quiet_settings(),
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")  # whatever metrics.toml does not name
        return run

    try:
        return start(mode)
    except wandb.errors.CommError as error:
        if config.mode != "auto" or mode == "offline":
            raise
        reason = str(error).splitlines()[0]
        print(f"wandb has a login but does not answer; this run is recorded offline ({reason})", file=sys.stderr)
        return start("offline")


def _stop_wandb(run: "Run", failed: bool) -> None:
    """Finish the run and end wandb's service process: `finish` alone may return before the record is on disk."""
    import wandb

    run.finish(exit_code=int(failed))
    wandb.teardown(exit_code=int(failed))


def _quiet_settings() -> "Settings":
    """No banners, and no copy of the console (the run's own logs do that)."""
    import wandb

    return wandb.Settings(console="off", silent=True, init_timeout=WANDB_INIT_TIMEOUT_S)


def _config_of(folder: Path) -> dict[str, Any]:
    file = folder / "config.yaml"
    return (yaml.safe_load(file.read_text()) or {}) if file.exists() else {}


def _sync_folder(run: "Run") -> str:
    """The folder that `wandb sync` takes: the parent of the run's files."""
    return str(Path(run.dir).parent)


def _open_to_append(file: Path) -> TextIO:
    """Open for whole lines, after ending a line that a crash cut short."""
    torn = file.exists() and file.read_bytes()[-1:] not in (b"", b"\n")
    handle = file.open("a")
    if torn:
        handle.write("\n")
    return handle
