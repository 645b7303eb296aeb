"""The files around the code agree with it: changelog, contributing guide, commit hooks, make's targets."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def recipe(target: str) -> str:
    """The command lines of one of make's targets."""
    (found,) = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    return found


def test_the_changelog_is_of_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(.+?)\](.*)$", text, re.MULTILINE)
    newest = [version for version, _ in versions if version != "Unreleased"][0]
    assert newest == PROJECT["project"]["version"]
    assert all(
        re.fullmatch(r" - (unreleased|\d{4}-\d\d-\d\d)", rest) for name, rest in versions if name != "Unreleased"
    )
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= KINDS


def test_the_commit_hooks_are_what_make_runs() -> None:
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local", "anything else is fetched"
    commands = [shlex.split(hook["entry"]) for hook in repo["hooks"]]
    assert {hook["language"] for hook in repo["hooks"]} == {"system"}
    assert [command[0] for command in commands] == [".venv/bin/ruff", ".venv/bin/ruff", ".venv/bin/mypy"]
    made = recipe("lint") + recipe("types")
    for tool, *words in commands:
        assert " ".join([tool.replace(".venv/bin", "$(BIN)"), *words[:1]]) in made
    installed = " ".join(PROJECT["project"]["optional-dependencies"]["dev"])
    assert "ruff" in installed and "mypy" in installed


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_what_the_page_names_is_there(page: str) -> None:
    text = (ROOT / page).read_text()
    for name in re.findall(r"`((?:\w+/)+(?:\w+\.\w+)?)`", text) + re.findall(r"\b(?:tests|scripts)/[\w/]+\.py", text):
        assert (ROOT / name).exists(), name
    for target in re.findall(r"`make ([\w-]+)`", text):
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target


def test_every_break_names_what_is_there() -> None:
    rows = re.findall(
        r"^\| [^|`]+ \| `([\w/]+\.py)`(?:, `(\w+)`)?: .+? \| `(tests/[\w/]+\.py)` \|$",
        (ROOT / "CONTRIBUTING.md").read_text(),
        re.MULTILINE,
    )
    assert len(rows) == 9
    for source, function, test in rows:
        assert (ROOT / test).is_file()
        assert f"def {function}" in (ROOT / source).read_text()
