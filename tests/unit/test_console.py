"""What is shown: warnings of libraries once and from rank 0 alone, errors from every rank, colours where they are."""

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from trainers.console import RED, SETTINGS, has_colours, is_terminal, painted

ROOT = Path(__file__).resolve().parents[2]
SPEAKING = """
import sys
from trainers.console import set_up_console
set_up_console(verbose="--verbose" in sys.argv, is_main="main" in sys.argv)
import logging, os, warnings
logging.basicConfig(format="%(name)s %(levelname)s: %(message)s", level=logging.INFO)
for name in ("transformers.models", "mine"):
    for _ in range(2):
        logging.getLogger(name).warning("is %s", "odd")
        logging.getLogger(name).error("is wrong")
for number in range(2):
    exec(compile("\\n" * number + "warnings.warn('beware')", f"file{number}.py", "exec"))
print(os.environ["VLLM_LOGGING_LEVEL"], os.environ.get("TORCH_CPP_LOG_LEVEL"))
"""


def says(*arguments: str, env: dict[str, str] | None = None) -> tuple[dict[str, int], str]:
    """How often each thing is said on stderr, and what the libraries are set to."""
    clean = {name: value for name, value in os.environ.items() if name not in (*SETTINGS, "PYTHONWARNINGS")}
    done = subprocess.run(
        [sys.executable, "-c", SPEAKING, *arguments],
        cwd=ROOT,
        env=clean | (env or {}),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("  ")]
    return {line.replace("<string>:1: ", ""): lines.count(line) for line in lines}, done.stdout.strip()


LIBRARY, OWN = "transformers.models", "mine"


def test_rank_0_says_each_warning_once_and_all_errors():
    said, settings = says("main")
    assert said.pop(f"{LIBRARY} WARNING: is odd") == 1
    assert said.pop(f"{LIBRARY} ERROR: is wrong") == 2
    assert (said.pop(f"{OWN} WARNING: is odd"), said.pop(f"{OWN} ERROR: is wrong")) == (2, 2), "the user's own stay"
    assert len(said) == 1 and "UserWarning: beware" in next(iter(said)), "once, though from two places"
    assert settings == "ERROR ERROR"


def test_other_ranks_say_errors_alone():
    said, settings = says()
    assert said == {f"{LIBRARY} ERROR: is wrong": 2, f"{OWN} WARNING: is odd": 2, f"{OWN} ERROR: is wrong": 2}
    assert settings == "ERROR ERROR"


def test_verbose_says_everything_on_every_rank():
    said, settings = says("--verbose")
    assert said[f"{LIBRARY} WARNING: is odd"] == 2
    assert sum("UserWarning: beware" in line for line in said) == 2
    assert settings == "INFO None"


def test_the_environment_goes_before():
    said, settings = says(env={"VLLM_LOGGING_LEVEL": "DEBUG", "PYTHONWARNINGS": "always"})
    assert sum("UserWarning: beware" in line for line in said) == 2
    assert settings == "DEBUG ERROR"


@pytest.fixture
def terminal():
    ours, theirs = pty.openpty()
    with open(theirs, "w") as stream:
        yield stream
    os.close(ours)


def test_colours_are_for_terminals_without_no_color(terminal, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert has_colours(terminal) and painted("error:", RED, terminal) == "\033[1;31merror:\033[0m"
    assert not has_colours(io.StringIO()) and painted("error:", RED, io.StringIO()) == "error:"
    monkeypatch.setenv("TERM", "dumb")
    assert not has_colours(terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_colours(terminal) and painted("error:", RED, terminal) == "error:"


def test_a_terminal_without_a_size_gets_no_bar(terminal, monkeypatch):
    monkeypatch.setattr(os, "get_terminal_size", lambda descriptor: os.terminal_size((80, 24)))
    assert is_terminal(terminal) and not is_terminal(io.StringIO())
    monkeypatch.setattr(os, "get_terminal_size", lambda descriptor: os.terminal_size((0, 0)))
    assert not is_terminal(terminal)
