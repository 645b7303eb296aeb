"""What the libraries below say on the console, and in which colours: warnings once and from rank 0 alone, errors from
every rank, all of it with `--verbose`.

Set up before torch, transformers and vllm are imported: they read the environment then, and make their loggers.
"""

import logging
import os
import sys
import warnings
from typing import TextIO

LIBRARIES = ("accelerate", "datasets", "huggingface_hub", "torch", "transformers", "vllm", "wandb")
# By variable: the value without and with --verbose; None leaves the library its own.
SETTINGS: dict[str, tuple[str | None, str | None]] = {
    "VLLM_LOGGING_LEVEL": ("ERROR", "INFO"),
    "VLLM_LOGGING_STREAM": ("ext://sys.stderr", "ext://sys.stderr"),
    "TORCH_CPP_LOG_LEVEL": ("ERROR", None),
}

BOLD, RED = "1", "1;31"


def set_up_console(verbose: bool, is_main: bool) -> None:
    """Settle what this process shows. What the environment or Python's -W says already stays.

    Args:
        verbose: True shows what each rank's libraries say of themselves, repeated as often as they say it.
        is_main: True on rank 0, which alone shows warnings.
    """
    for name, values in SETTINGS.items():
        if (value := values[verbose]) is not None:
            os.environ.setdefault(name, value)
    if verbose:
        return
    if not sys.warnoptions:
        warnings.filterwarnings("once" if is_main else "ignore", append=is_main)
    logging.setLoggerClass(FirstRankLogger if is_main else OtherRankLogger)


class FirstRankLogger(logging.Logger):
    """Passes each warning of LIBRARIES on once, whoever handles it; and all else."""

    def handle(self, record: logging.LogRecord) -> None:
        """Show a library's warning once, anything else each time."""
        if _is_library_warning(record):
            key = (record.name, record.getMessage())
            if key in _shown:
                return
            _shown.add(key)
        super().handle(record)


class OtherRankLogger(logging.Logger):
    """Passes no warning of LIBRARIES on; and all else."""

    def handle(self, record: logging.LogRecord) -> None:
        """Show anything but a library's warning, which rank 0 shows."""
        if not _is_library_warning(record):
            super().handle(record)


def is_terminal(stream: TextIO) -> bool:
    """Whether a bar can be drawn: a terminal, and one that knows its size (some containers' have 0 rows)."""
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).lines > 0
    except OSError:
        return False


def has_colours(stream: TextIO) -> bool:
    """True for a terminal, unless NO_COLOR is set (https://no-color.org) or TERM is dumb."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def painted(text: str, colour: str, stream: TextIO) -> str:
    """The text in a colour, where the stream shows colours.

    >>> import io
    >>> painted("error:", RED, io.StringIO())
    'error:'
    """
    return f"\033[{colour}m{text}\033[0m" if has_colours(stream) else text


_shown: set[tuple[str, str]] = set()


def _is_library_warning(record: logging.LogRecord) -> bool:
    return record.levelno == logging.WARNING and record.name.partition(".")[0] in LIBRARIES
