"""docs/configuration.md and configs/README.md say what is there: each key, environment variable and config."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainers.keys import sections_of
from trainers.reference import BEGIN, END, EXPERIMENTS, with_tables

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "configuration.md"
FOLDERS = ("rollout", "trainers", "scripts")


def test_the_page_is_current():
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page) == page, "docs/configuration.md is not what the dataclasses say; run `make reference`"


def test_the_page_has_every_key_of_every_script_once():
    listed = re.findall(r"^\| `(\w+\.\w+)` ", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    keys = {key.name for experiment in EXPERIMENTS.values() for s in sections_of(experiment).values() for key in s.keys}
    assert set(listed) == keys and len(listed) == len(keys) > 80


@pytest.mark.parametrize("script", EXPERIMENTS)
def test_no_key_and_no_section_lacks_a_meaning(script):
    sections = sections_of(EXPERIMENTS[script])
    silent = [name for name, section in sections.items() if not section.about]
    silent += [key.name for section in sections.values() for key in section.keys if not key.meaning]
    assert not silent, f"no meaning in the docstring of the dataclass: {', '.join(silent)}"


def test_a_page_without_its_marks_is_refused():
    assert with_tables(f"a\n{BEGIN}old\n{END}z\n").startswith(f"a\n{BEGIN}\n## model: the policy to train\n")
    with pytest.raises(ValueError, match="until here"):
        with_tables(f"a\n{BEGIN}old\n")


def test_every_config_has_its_line():
    page = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `([\w.]+\.yaml)` \| \S", page, re.MULTILINE))
    there = {file.name for file in (ROOT / "configs").glob("*.yaml")}
    assert not there - listed, f"configs/README.md has no line `| NAME | what it runs |` for {sorted(there - listed)}"
    assert not listed - there, f"configs/README.md has a line for what is not there: {sorted(listed - there)}"


def test_every_environment_variable_is_listed():
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in files}
    constants = {name: value for tree in trees.values() for name, value in constants_of(tree)}
    del trees[ROOT / "rollout" / "isolation.py"]  # puts back whatever was there, by no name
    used = {name for file, tree in trees.items() for name in variables(tree, constants, file.relative_to(ROOT))}
    table = PAGE.read_text(encoding="utf-8").partition("## Environment variables")[2]
    listed = {
        name for row in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    assert len(used) > 10
    assert not used - listed, f"docs/configuration.md lists no {sorted(used - listed)} among the environment variables"
    assert not listed - used, f"docs/configuration.md lists {sorted(listed - used)}, which nothing reads or sets"


def constants_of(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """Names that a module assigns a value at its top level."""
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if is_name(target) and node.value is not None:
            yield target.id, node.value


def variables(tree: ast.Module, constants: dict[str, ast.expr], file: Path) -> Iterator[str]:
    """The names with which a file looks into os.environ, or which it adds to a copy."""
    assigned = {n.targets[0].id: n.value for n in ast.walk(tree) if isinstance(n, ast.Assign) and is_name(n.targets[0])}
    loops, constants = dict(loops_of(tree)), constants | dict(constants_of(tree))
    for node in ast.walk(tree):
        for key in keys_of(node, assigned):
            while isinstance(key, ast.Name):
                known = loops.get(key.id) or constants.get(key.id)
                assert known is not None, f"{file}, line {node.lineno}: which variable is {key.id}?"
                key = known
            for each in getattr(key, "elts", None) or getattr(key, "keys", None) or [key]:
                assert isinstance(each, ast.Constant), f"{file}, line {node.lineno}: which variable is that?"
                yield each.value


def loops_of(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """Names that run through a tuple, or through a dict's items."""
    for node in ast.walk(tree):
        if isinstance(node, ast.comprehension) and is_name(node.target):
            yield node.target.id, node.iter
        if isinstance(node, ast.For) and isinstance(node.target, ast.Tuple) and isinstance(node.iter, ast.Call):
            first = node.target.elts[0]
            if is_name(first):
                yield first.id, getattr(node.iter.func, "value", node.iter)


def keys_of(node: ast.AST, assigned: dict[str, ast.expr]) -> list[ast.expr]:
    """What one expression names of os.environ."""
    if isinstance(node, ast.Subscript) and is_environ(node.value):
        return [node.slice]
    if isinstance(node, ast.Compare) and any(map(is_environ, node.comparators)):
        return [node.left]
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "os.getenv":
        return [node.args[0]]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and is_environ(node.func.value):
        return [node.args[0]] if node.func.attr in ("get", "setdefault", "pop") else []
    if isinstance(node, ast.Dict) and any(map(is_environ, node.values)):
        merged = [assigned[value.id] for value in node.values if is_name(value) and value.id in assigned]
        dicts = [node, *(each for each in merged if isinstance(each, ast.Dict))]
        return [key for each in dicts for key in each.keys if key is not None]
    return []


def is_environ(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "environ" and ast.unparse(node) == "os.environ"


def is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name)
