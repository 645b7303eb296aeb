"""Public functions say what shapes they take and return, and what they raise; ruff sees to it that they say anything.

A function is public if nothing on its path has a leading underscore. Arrays and tensors are what the annotations say.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = [file for folder in ("rollout", "trainers") for file in sorted((ROOT / folder).rglob("*.py"))]

ARRAY = re.compile(r"\b(Tensor|ndarray|DTensor)\b")
# "(batch, response)", "(rows,)", "(2, rows, blocks)", "(k * n,)"; or in words.
SIZE = r"(?:at most |at least )?`?[\w*+/-]+`?(?: [\w*+/-]+){0,3}"
SHAPE = re.compile(rf"(?<!\w)\({SIZE},(?: {SIZE},?)*\)|\bany shape\b|\bscalars?\b|\bshapes?\b", re.IGNORECASE)
# "as `Logits.float`": the other one says it.
REFERENCE = re.compile(r"\b[Aa]s `[\w.]+`")

# Errors that no caller can mend: what has no public words for them.
OURS = {"AssertionError", "NotImplementedError", "StopIteration", "SystemExit", "AttributeError"}


@dataclass(frozen=True)
class Function:
    """One public function or method."""

    where: str
    name: str
    node: ast.FunctionDef

    @property
    def doc(self) -> str:
        """Without doctests: a call looks like a shape."""
        return (ast.get_docstring(self.node) or "").partition(">>>")[0]

    def __str__(self) -> str:
        return f"{self.where}:{self.node.lineno} {self.name}"


def public_functions() -> list[Function]:
    return [each for file in FILES for each in functions_in(ast.parse(file.read_text()), str(file.relative_to(ROOT)))]


def functions_in(node: ast.AST, where: str, prefix: str = "") -> Iterator[Function]:
    """Of a module or a class; not what is made inside of functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef) and not child.name.startswith("_"):
            yield Function(where, prefix + child.name, child)
        elif isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from functions_in(child, where, f"{prefix}{child.name}.")


def arrays_of(node: ast.FunctionDef) -> list[str]:
    """Annotations that name a tensor or an array by itself: of those in a list or a dict each has its own shape."""
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    annotations = [each.annotation for each in arguments] + [node.returns]
    texts = [ast.unparse(each).strip("'") for each in annotations if each is not None]
    return [text for text in texts if ARRAY.search(text) and "[" not in text.replace("tuple[", "")]


def raised_by(node: ast.FunctionDef) -> set[str]:
    """Names of the classes that the function itself raises and does not catch; not what it calls."""
    found = set()
    for each in within(node):
        match each:
            case ast.Raise(exc=ast.Call(func=ast.Name(id=name))) if name[0].isupper():
                found.add(name)
    return found - OURS


def within(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a function, without functions inside of it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            yield child
            yield from within(child)


def said_to_raise(doc: str) -> set[str]:
    """The classes in its section `Raises:`."""
    section = re.search(r"^Raises:\n((?: {4,}.*\n?|\n)+)", doc, re.MULTILINE)
    return (
        set(re.findall(r"\b[A-Z]\w+", " ".join(re.findall(r"^ {4}(\S[^:]*):", section[1], re.MULTILINE))))
        if section
        else set()
    )


def says_shapes(doc: str) -> bool:
    return bool(SHAPE.search(doc) or REFERENCE.search(doc))


def test_shapes_are_said() -> None:
    asked = [each for each in public_functions() if arrays_of(each.node)]
    silent = [str(each) for each in asked if not says_shapes(each.doc)]
    assert len(asked) > 60
    assert not silent, "which shapes?\n" + "\n".join(silent)


def test_errors_are_said() -> None:
    asked = [each for each in public_functions() if raised_by(each.node)]
    silent = [f"{each}: {missing}" for each in asked if (missing := raised_by(each.node) - said_to_raise(each.doc))]
    assert len(asked) > 60
    assert not silent, "no `Raises:` for\n" + "\n".join(silent)


def test_what_is_a_shape() -> None:
    for doc in ("(rows,) int64", "Twice (batch, response) float32.", "x: any shape, bool", "A scalar.", "As `a.b`."):
        assert says_shapes(doc), doc
    for doc in (
        "All of them.",
        "generate(prompts, sampling)",
        "The sum (of all ranks).",
        "It ends (in time) or raises.",
    ):
        assert not says_shapes(doc), doc


def test_who_is_asked() -> None:
    source = """
class Public:
    def takes(self, x: torch.Tensor, names: list[np.ndarray]) -> "np.ndarray":
        raise ValueError("no")
    def _private(self, x: torch.Tensor): ...
class _Private:
    def takes(self, x: torch.Tensor): ...
def catches(x: dict[str, torch.Tensor]) -> int:
    def inner():
        raise KeyError(1)
    raise NotImplementedError
"""
    takes, catches = functions_in(ast.parse(source), "some.py")
    assert (takes.name, arrays_of(takes.node), raised_by(takes.node)) == (
        "Public.takes",
        ["torch.Tensor", "np.ndarray"],
        {"ValueError"},
    )
    assert (catches.name, arrays_of(catches.node), raised_by(catches.node)) == ("catches", [], set())
    said = "Raises:\n    ValueError: if not:\n        a KeyError.\n    RuntimeError, OSError: else."
    assert said_to_raise(said) == {"ValueError", "RuntimeError", "OSError"}
