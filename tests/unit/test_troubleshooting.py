"""docs/troubleshooting.md has every message that a user can meet, and none that is not there."""

import ast
import importlib.util
import mmap
import re
from pathlib import Path

import pytest

from tests.messages import HOLE, ROOT, Message, all_messages, constant_text, messages_of, pattern_of

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
OURS, _, OTHERS = PAGE.partition("## What other libraries say")
LEAST_CONSTANT = 6
"""Letters of an entry, so that none covers everything."""

# Beginnings of messages, as on the page, that no user has to mend, and why.
INTERNAL = {
    "module 'rollout' has no attribute": "Python's own words for a name that is not there",
    "no loader took": "a reason inside of `weights are synced through vLLM's reload`",
    "SOURCE arrives in another place each time": "likewise",
    "a loader of TARGET does more than copy": "likewise",
    "SOURCE: the plan takes more than": "likewise",
    "no arithmetic": "caught in the file: the calculator answers that it is none",
    "too large": "likewise",
    "a bucket of N bytes holds no number": "the size is a constant of ours",
    "row N of a batch of": "an IndexError, as a list has it: what ends a loop over a batch",
    "there is no environment to ask": "an assertion",
    "it leaves such messages out": "the reason inside of `the model's chat template refuses a message`",
    "there is no such file": "the reason inside of `KEY has PATH, but WHERE cannot be imported`",
    "MODEL attends with": "caught: such a model is trained with padding",
    "the page needs a line": "of `make reference`, for who edits the page",
    "steps N against": "two_hosts.py compares its own runs",
    "The config is sound": "--dry-run's good news",
    "PATH: starting the engine": "progress",
    "FOLDER: MODEL on N prompts": "progress",
    "N replicas, repeat": "progress",
    "N ranks, repeat": "progress",
    "NAME: SECONDS s a step, peak": "progress",
    "measuring; an engine is compiled": "progress",
    "soak: phase": "progress",
    "bench_rollout: LINE": "progress, and messages that stand elsewhere",
    "prepare_model: ERROR": "messages that stand elsewhere",
}

# What has no words of its own: file and call, as far as they tell it apart, and whose words it passes on.
PASSED_ON = {
    "rollout/backend/sync_plan.py: NoPlan(f'{source}: {error!r}')": "a loader's error, as a reason for no plan",
    "rollout/failure.py: Failure(self._rank,": "any error",
    "rollout/failure.py: _complain(failure.traceback": "the first error's traceback",
    "rollout/failure.py: print(text": "of `_complain`, which is looked at where it is called",
    "trainers/calculator.py: ValueError('too long')": "caught in the file",
    "trainers/checkpoint.py: ConfigError(reason)": "rank 0's error, on every rank",
    "trainers/checkpoint.py: RuntimeError(reason)": "likewise",
    "trainers/checkpoint.py: ValueError(otherwise)": "the reason inside of `the checkpoint PATH cannot be read`",
    "trainers/cli.py: ConfigError(str(error))": "a range check of rollout/config.py",
    "trainers/cli.py: print(": "any ConfigError",
    "trainers/nodes.py: ConfigError(str(error))": "rollout/world.py's",
    "trainers/progress.py: print(": "progress",
    "trainers/resume.py: print(''.join(": "restart_notes of trainers/restart.py",
    "trainers/reward_pool.py: ConfigError(answer)": "a worker's, of trainers/reward_functions.py",
    "scripts/bench_rollout.py: sys.exit(128 + signal.SIGTERM)": "no text",
    "scripts/bench_step.py: sys.exit(128 + signal.SIGTERM)": "no text",
    "scripts/compare_schedules.py: sys.exit(not same)": "no text",
    "scripts/export.py: print(": "any ConfigError",
    "scripts/learning.py: RuntimeError(": "the end of a run's own output",
    "scripts/learning.py: print(": "progress",
    "scripts/plan.py: sys.exit(f'error: {error}')": "any ConfigError",
    "scripts/report.py: print(": "any ValueError",
    "scripts/soak.py: sys.exit(": "no text",
    "scripts/two_hosts.py: print(": "NoHosts",
    "scripts/two_hosts.py: sys.exit(": "no text",
}

MESSAGES = all_messages()


def entries(page: str) -> list[str]:
    """The messages of all tables: the code spans of their first cells."""
    firsts = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    return [entry for cell in firsts for entry in re.findall(r"`([^`]+)`", cell)]


def matches(entry: str, message: Message) -> bool:
    return pattern_of(entry).match(message.template) is not None


def test_every_message_has_an_entry() -> None:
    known = [pattern_of(entry) for entry in [*entries(OURS), *INTERNAL]]
    lost = [str(each) for each in MESSAGES if not each.passes_on and not any(p.match(each.template) for p in known)]
    assert len(MESSAGES) > 250
    assert not lost, "docs/troubleshooting.md has no entry for\n" + "\n".join(lost)


@pytest.mark.parametrize("entry", [*entries(OURS), *INTERNAL])
def test_every_entry_is_said_somewhere(entry: str) -> None:
    assert constant_text(entry) >= LEAST_CONSTANT, "too little text: it would match anything"
    assert any(matches(entry, message) for message in MESSAGES), "nothing in the sources begins like that"


def test_no_entry_stands_twice() -> None:
    listed = [*entries(OURS), *INTERNAL]
    assert len(entries(OURS)) > 150
    assert sorted(set(listed)) == sorted(listed)


def test_what_passes_messages_on_is_known() -> None:
    silent = {each.said for each in MESSAGES if each.passes_on}
    unknown = [said for said in silent if not said.startswith(tuple(PASSED_ON))]
    assert not unknown, f"whose words are these? {unknown}"
    gone = [said for said in PASSED_ON if not any(each.startswith(said) for each in silent)]
    assert not gone, f"nothing says {gone}"


def test_every_row_has_meaning_and_cure() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    thin = [row for row in rows if row.count(" | ") != 2 or not all(cell.strip() for cell in row.strip("|").split("|"))]
    assert not thin, thin


@pytest.mark.parametrize("row", re.findall(r"^\| `(.+?)` \| `(\S+)` \|", OTHERS, re.MULTILINE))
def test_other_libraries_still_say_so(row: tuple[str, str]) -> None:
    message, path = row
    spec = importlib.util.find_spec(path.partition("/")[0])
    assert spec is not None and spec.origin is not None
    file = Path(spec.origin).parents[1] / path
    if not file.exists() and path.endswith(".so"):
        pytest.skip("of the CUDA build")
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        assert content.find(message.encode()) >= 0


def test_a_new_message_is_seen_and_missed() -> None:
    said = """
def f(x):
    why = "dark" if x else "gone"
    raise ConfigError(f"data.moon is {x}, which is {why} since {x.year}")
"""
    found = list(messages_of(ast.parse(said), "new.py", {}))
    assert [each.template.replace(HOLE, "?") for each in found] == [
        "data.moon is ?, which is dark since ?",
        "data.moon is ?, which is gone since ?",
    ]
    assert not any(matches(entry, each) for entry in [*entries(OURS), *INTERNAL] for each in found)


def test_a_placeholder_is_one_word() -> None:
    pattern = pattern_of("KEY is VALUE; it must be")
    assert pattern.match(f"rollout.seed is {HOLE}; it must be at least 0")
    assert not pattern.match(f"the seed of all is {HOLE}; it must be at least 0")
