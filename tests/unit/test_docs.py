"""What README.md and docs/ tell a reader to type, open or set is there, and is taken."""

import argparse
import ast
import os
import re
import runpy
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.pages import PAGES, ROOT, Block, anchors_of, blocks_of, prose_of, spans_of, tool_of
from trainers.checks import check_world
from trainers.cli import dump, parse
from trainers.config import EvaluateConfig, Experiment, GRPOConfig, PPOConfig
from trainers.keys import sections_of
from trainers.reward_functions import Sample, Task, judge, load_functions

EXPERIMENTS: dict[str, type[Experiment]] = {
    "scripts/ppo.py": PPOConfig,
    "scripts/grpo.py": GRPOConfig,
    "scripts/evaluate.py": EvaluateConfig,
    "best_of_n.py": GRPOConfig,
}
# Python that a page has its readers save, by its first line, and the test that runs it.
RUN_BY = {
    "from transformers import AutoModelForCausalLM": "tests/smoke/test_readme.py",
    "# reinforce.py: REINFORCE with the group's mean as a baseline": "tests/engine/test_library.py",
    "# best_of_n.py: learn from the best response to each prompt only": "tests/engine/test_library.py",
    "# mine.py": "tests/engine/test_library.py",
    "# short_reward.py": "tests/unit/test_docs.py",
    "# teacher.py": "tests/unit/test_docs.py",
}
# Other blocks, by their first line: what they are.
SHOWN = {
    "torchrun --nproc_per_node=2 scripts/ppo.py configs/ppo_arithmetic.yaml": "what make prints, and the run's lines",
    "step 1/16: reward": "the run's lines",
    "9/16 steps |": "the bar",
    "rollout/              the library": "the repository layout, file by file",
    "rollout/        the library": "the repository layout",
    "torchrun ──> rank 0: trainer (data-parallel) + engine (tensor-parallel shard 0)": "a diagram",
    "main thread ": "a diagram",
    "world size = ": "a formula",
}
WRONG_ON_PURPOSE = ("rollout.max_num_seq", "ppo.steps=three")
KEYS = {
    name: {key.name for section in sections_of(kind).values() for key in section.keys}
    for name, kind in EXPERIMENTS.items()
}
ALL_KEYS = set().union(*KEYS.values())
SECTIONS = {key.partition(".")[0] for key in ALL_KEYS}
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
COMMANDS = [
    pytest.param(words, id=f"{block.page}: {' '.join(words)[:70]}")
    for block in BLOCKS
    for words in block.commands()
    if SHOWN.get(block.first_line) != "a diagram"
]
names = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


class Accepted(BaseException):
    """A script's parser has taken its arguments."""


def test_every_block_is_run_or_known() -> None:
    """A new one is a command, or Python that a test runs, or is listed above."""
    strange = [
        f"{block.page}: {block.first_line}"
        for block in BLOCKS
        if not (block.commands() or block.first_line in RUN_BY or block.first_line.startswith(tuple(SHOWN)))
    ]
    assert not strange and len(BLOCKS) > 30 and len(COMMANDS) > 30
    first_lines = [block.first_line for block in BLOCKS]
    assert not [begin for begin in [*RUN_BY, *SHOWN] if not any(line.startswith(begin) for line in first_lines)]
    for test in RUN_BY.values():
        assert (ROOT / test).is_file()


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_is_taken(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool, *rest = words
    if tool_of(tool) == "make":
        check_make(rest, tmp_path)
    elif any(word.endswith(".py") for word in rest):
        at = next(index for index, word in enumerate(rest) if word.endswith(".py"))
        check_launcher(tool_of(tool), rest[:at])
        check_script(rest[at], rest[at + 1 :], ranks_of(rest[:at]), tmp_path, monkeypatch)
    else:
        assert tool_of(tool) in ("wandb", "pip", "pre-commit", "export", "sbatch", "kubectl"), words


def check_make(words: list[str], tmp_path: Path) -> None:
    """Its target is there; ARGS of a run are overrides that are taken."""
    variables = dict(word.split("=", 1) for word in words if "=" in word)
    targets = [word for word in words if "=" not in word]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets), targets
    assert all(re.search(rf"^{name} [?:]=|\$\${{{name}", makefile, re.MULTILINE) for name in variables), variables
    if targets == ["ppo"]:
        overrides = variables.get("ARGS", "").split()
        check_experiment(
            "scripts/ppo.py", [variables.get("CONFIG", "configs/ppo_arithmetic.yaml"), *overrides], 2, tmp_path
        )


def check_launcher(tool: str, words: list[str]) -> None:
    """Of torchrun's options; python has none here."""
    if tool == "torchrun":
        from torch.distributed.run import get_args_parser

        get_args_parser().parse_args([*words, "script.py"])
    else:
        assert tool in ("python", "python3.11") and not words


def ranks_of(words: list[str]) -> int:
    """That torchrun is told to start on all nodes."""
    told = dict(word.lstrip("-").replace("-", "_").split("=", 1) for word in words if "=" in word)
    return int(told.get("nproc_per_node", "1")) * int(told.get("nnodes", "1").rpartition(":")[2])


def check_script(script: str, words: list[str], ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if script in EXPERIMENTS:
        check_experiment(script, words, ranks, tmp_path)
    elif script.startswith("scripts/"):
        check_parser(script, words, monkeypatch)
    else:  # a test's worker, the lock, or a file that the page has its reader save
        assert (ROOT / script).is_file() or f"# {script}" in "\n".join(RUN_BY)


def check_experiment(script: str, words: list[str], ranks: int, tmp_path: Path) -> None:
    """The config and its overrides are sound, whatever the data and the model that they name."""
    kind = EXPERIMENTS[script]
    if "--help" in words:
        known = {*KEYS[script], *(key.partition(".")[0] for key in KEYS[script])}
        assert set(words) - {"--help"} <= known
        return
    of_a_run = tmp_path / "config.yaml"
    of_a_run.write_text(dump(kind()))
    files = [
        str(of_a_run) if word.startswith("runs/") else str(ROOT / word) for word in words if word.endswith(".yaml")
    ]
    config, _ = parse(kind, files + [word for word in words if not word.endswith(".yaml")])
    check_world(config, ranks)


def check_parser(script: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Start the script as its reader would, as far as its parser."""

    def accept(name: str) -> None:
        original = getattr(argparse.ArgumentParser, name)

        def parsed(self: argparse.ArgumentParser, *args: object) -> None:
            original(self, *args)
            raise Accepted

        monkeypatch.setattr(argparse.ArgumentParser, name, parsed)

    accept("parse_args")
    accept("parse_intermixed_args")
    before = dict(os.environ)
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.setattr(sys, "path", [*sys.path])
    try:
        with pytest.raises(Accepted):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        os.environ.clear()
        os.environ.update(before)


@names
def test_every_link_resolves(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and anchor not in anchors_of(there)):
            broken.append(target)
    assert not broken


@names
def test_every_path_is_there(page: Path) -> None:
    """In code spans: paths from the root; in docs/ also those inside of rollout/."""
    folders = "rollout|trainers|scripts|tests|configs|docs|requirements|backend|kernels"
    named = {
        path
        for span in spans_of(page)
        for path in re.findall(rf"(?:^|[ (])((?:{folders})/[\w./]*[\w/])", span)
        if "." in path.rpartition("/")[2] or path.endswith("/")
    }
    roots = (ROOT, ROOT / "rollout", ROOT / "rollout" / "backend")
    assert not [path for path in sorted(named) if not any((root / path).exists() for root in roots)]


@names
def test_every_setting_is_a_key(page: Path) -> None:
    """`section.key=value` in a code span is taken; `section.key` is there."""
    unknown = []
    for span in spans_of(page):
        for word in re.findall(r"(?<![\w./-])([a-z_]+\.\w+=?)(?![\w.(*])", span):
            key = word.removesuffix("=")
            section, _, name = key.partition(".")
            if (
                section in SECTIONS
                and key not in ALL_KEYS
                and key not in WRONG_ON_PURPOSE
                and not is_other(section, name)
            ):
                unknown.append(span)
    assert not unknown


def is_other(section: str, name: str) -> bool:
    """A placeholder; a file; a module as in rollout.generate, and what its package has."""
    package = ROOT / section / "__init__.py"
    public = package.read_text() if package.is_file() else ""
    return (
        name.isupper()
        or name in ("py", "json", "jsonl", "png", "yaml")
        or (ROOT / section / f"{name}.py").exists()
        or re.search(rf"\b{name}\b", public) is not None
    )


def test_every_value_of_a_setting_is_taken() -> None:
    """Those with a value that no reader has to fill in."""
    words = {word for page in PAGES for span in spans_of(page) for word in settings_in(span)}
    assert len(words) > 30
    batches: dict[
        tuple[str, int], list[str]
    ] = {}  # of one script, with distinct keys: of two values the later one counts
    seen: Counter[str] = Counter()
    for word in sorted(words.difference(WRONG_ON_PURPOSE)):
        key = word.partition("=")[0]
        script = next(script for script in ("scripts/grpo.py", "scripts/ppo.py") if key in KEYS[script])
        batches.setdefault((script, seen[key]), []).append(word)
        seen[key] += 1
    for (script, _), batch in batches.items():
        check_settings(script, batch)


def check_settings(script: str, words: list[str]) -> None:
    """Parsed together, since that takes as long as one; apart where they contradict each other."""
    try:
        parse(EXPERIMENTS[script], words)
    except ValueError as error:
        assert "it must be" not in str(error) and "is not a key" not in str(error), error
        if len(words) > 1:  # else it contradicts another key's default, which is no mistake of the page's
            check_settings(script, words[: len(words) // 2])
            check_settings(script, words[len(words) // 2 :])


def settings_in(span: str) -> list[str]:
    found = re.findall(r"(?<![\w./-])([a-z_]+\.\w+=(?:\[[^\]]*\]|[^\s'\[]+))", span)
    keys = [word for word in found if word.partition(".")[0] in SECTIONS]
    return [word for word in keys if not re.search(r"=.*([A-Z]{2,}|\.\.\.)", word)]


@pytest.mark.parametrize(("name", "response", "expected"), [("short", "7", 1.0)])
def test_the_reward_of_the_training_page(name: str, response: str, expected: float, tmp_path: Path) -> None:
    functions = load_functions([f"{saved('short_reward.py', tmp_path)}:{name}"])
    assert judge(functions, Task(response, "7", Sample("3+4?", finished=True, tokens=10))) == [expected]
    assert judge(functions, Task(response, "7", Sample("3+4?", finished=True, tokens=100))) == [0.0]


def test_the_environment_of_the_training_page(tmp_path: Path) -> None:
    from trainers.conversation import Episode

    (teacher,) = load_functions([f"{saved('teacher.py', tmp_path)}:teacher"]).values()
    assert teacher(Episode("3+4?", "7", ("It is 7.",))) is None
    assert "Try again" in teacher(Episode("3+4?", "7", ("It is 8.",)))


def saved(name: str, folder: Path) -> Path:
    """The block of docs/training.md that begins with `# NAME`, as a file."""
    (block,) = [block for block in BLOCKS if block.page == "docs/training.md" and block.first_line == f"# {name}"]
    ast.parse(block.text)
    (folder / name).write_text(block.text)
    return folder / name


def test_the_repository_layout() -> None:
    """Its files are there."""
    blocks = [block for block in BLOCKS if block.page == "CONTRIBUTING.md"]
    (layout,) = [block for block in blocks if block.first_line.startswith("rollout/  ")]
    folder, missing = "", []
    for line in layout.text.splitlines():
        if match := re.match(r"(\w+/)", line):
            folder = match[1]
        missing += [
            f"{folder}{name}"
            for name in re.findall(r"\b\w+\.(?:py|toml)\b", line)
            if not (ROOT / folder / name).exists()
        ]
    assert not missing


@pytest.mark.parametrize(
    "line",
    [
        ".venv/bin/torchrun --nproc_per_node=2 scripts/ppo.py configs/ppo_arithmetic.yaml ppo.step=3",
        ".venv/bin/torchrun --nproc_per_node=3 scripts/ppo.py configs/ppo_arithmetic.yaml ppo.prompts_per_step=4",
        ".venv/bin/torchrun --nproc_per_rank=2 scripts/ppo.py",
        ".venv/bin/torchrun --nproc_per_node=2 scripts/ppo.py configs/ppo_arithmetics.yaml",
        "python scripts/report.py runs/A --outputs b.html",
        "python scripts/reports.py runs/A",
        "make poo",
        'make ppo ARGS="ppo.step=3"',
    ],
)
def test_a_wrong_command_is_seen(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (words,) = Block("page", "", line).commands()
    with pytest.raises((Exception, SystemExit)):
        test_a_command_is_taken(words, tmp_path, monkeypatch)
