"""What the sources can say when something goes wrong, read off their syntax trees.

A message is a template: text, with HOLE where a value goes in. One expression may make several (`a if b else c`).
"""

import ast
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from tests.launch import ROOT

HOLE = "\0"
FOLDERS = ("rollout", "trainers", "scripts")
LEAST_TEXT = 8
"""Letters; what has fewer of its own only passes on what something else says."""

SPEAKING = ("parser.error", "sys.exit", "warnings.warn", "logger.warning", "notes.append", "Failure", "_complain")

Scope = dict[str, list[ast.expr]]
Functions = dict[str, ast.FunctionDef]


@dataclass(frozen=True)
class Message:
    """One way in which one line of the sources speaks.

    Attributes:
        where: file and line.
        said: the call's source, as `ast.unparse` writes it.
        template: text with HOLEs.
    """

    where: str
    said: str
    template: str

    @property
    def passes_on(self) -> bool:
        return sum(map(str.isalpha, self.template)) < LEAST_TEXT

    def __str__(self) -> str:
        return f"{self.where}: {self.template.replace(HOLE, '{}')}"


def all_messages() -> list[Message]:
    """Of every error, warning, exit and line on stderr; and of the Makefile's `$(error ...)` and `echo "setup: ..."`.

    Functions are looked up by name in all files: what they return may be part of a message.
    """
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    trees = {str(file.relative_to(ROOT)): ast.parse(file.read_text()) for file in files}
    everywhere = {name: found for tree in trees.values() for name, found in functions_of(tree).items()}
    found = [message for name, tree in trees.items() for message in messages_of(tree, name, everywhere)]
    makefile = (ROOT / "Makefile").read_text()
    spoken = re.findall(r"\$\(error ((?:[^()]|\([^()]*\))*)\)|echo \"(setup: (?:found )?no[^\"]*)", makefile)
    return found + [Message("Makefile", "", re.sub(r"\$+[({]?\w+[)}]?", HOLE, "".join(each))) for each in spoken]


def messages_of(tree: ast.Module, name: str, everywhere: Functions) -> Iterator[Message]:
    """Of one file.

    Args:
        everywhere: functions of all files, by name.
    """
    functions, errors = everywhere | functions_of(tree), set(errors_of(tree))
    for call, scope in calls_of(tree, {}):
        for spoken in spoken_by(call, errors):
            for template in templates(spoken, scope, functions):
                yield Message(f"{name}:{call.lineno}", f"{name}: {ast.unparse(call)}", template)


def errors_of(tree: ast.Module) -> Iterator[str]:
    """Names of classes that the file raises, or makes an error by their base."""
    for node in ast.walk(tree):
        match node:
            case ast.Raise(exc=ast.Call(func=ast.Name(id=name))) if name[0].isupper() and name != "SystemExit":
                yield name
            case ast.ClassDef(name=name, bases=[ast.Name(id=base)]) if base.endswith("Error"):
                yield name


def functions_of(tree: ast.Module) -> Functions:
    """Functions and methods, by name."""
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def calls_of(node: ast.AST, scope: Scope) -> Iterator[tuple[ast.Call, Scope]]:
    """Every call, with the values that the function around it gives its names."""
    if isinstance(node, ast.FunctionDef):
        scope = {}
        for each in ast.walk(node):
            if isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name):
                scope.setdefault(each.targets[0].id, []).append(each.value)
    if isinstance(node, ast.Call):
        yield node, scope
    for child in ast.iter_child_nodes(node):
        yield from calls_of(child, scope)


def spoken_by(call: ast.Call, errors: set[str]) -> list[ast.expr]:
    """The argument that somebody will read, if there is one.

    Args:
        errors: names of classes, beside those that end in Error.
    """
    name = ast.unparse(call.func)
    to_stderr = any(key.arg == "file" and ast.unparse(key.value) == "sys.stderr" for key in call.keywords)
    first = {"OSError": 1, "Failure": 3}.get(name, 0) if len(call.args) > 1 else 0
    if (name == "print" and to_stderr) or name in SPEAKING or name in errors or name.endswith("Error"):
        return [each for each in call.args[first : first + 1] if not isinstance(each, ast.Starred)]
    return []


def templates(node: ast.expr, scope: Scope, functions: Functions) -> list[str]:
    """All texts that an expression can come to."""
    match node:
        case ast.Constant(value=str(text)):
            return [text.replace("%s", HOLE)]
        case ast.Constant(value=None):
            return []
        case ast.JoinedStr():
            parts = [templates(each, scope, functions) for each in node.values]
            return ["".join(each) for each in itertools.product(*parts)]
        case ast.FormattedValue():
            found = templates(node.value, scope, functions)
            return found if found and all(text.strip(HOLE) for text in found) else [HOLE]
        case ast.BinOp(op=ast.Add()):
            sides = (templates(side, scope, functions) for side in (node.left, node.right))
            return ["".join(each) for each in itertools.product(*sides)]
        case ast.IfExp():
            return templates(node.body, scope, functions) + templates(node.orelse, scope, functions)
        case ast.Name(id=name) if name in scope:
            outer = {other: values for other, values in scope.items() if other != name}
            return [text for value in scope[name] for text in templates(value, outer, functions)]
        case ast.Call(func=ast.Attribute(attr="strip", value=text)):
            return templates(text, scope, functions)
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in functions:
            return list(returned(functions[name])) or [HOLE]
    return [HOLE]


def returned(function: ast.FunctionDef) -> Iterator[str]:
    """What a function can return, if that is text."""
    for node in ast.walk(function):
        if isinstance(node, ast.Return) and node.value is not None:
            yield from templates(node.value, {}, {})


def pattern_of(entry: str) -> re.Pattern[str]:
    """Matches the messages that begin as an entry does: a word in capitals is any word, `...` is any text."""
    parts = re.split(r"(\.\.\.|(?<![A-Za-z])[A-Z][A-Z_]*(?![A-Za-z]))", entry)
    known = {"...": r"[\s\S]*?"}
    found = (known.get(part, r"\S+?") if place % 2 else re.escape(part) for place, part in enumerate(parts))
    return re.compile("".join(found))


def constant_text(entry: str) -> int:
    """Letters of an entry that are not placeholders."""
    return sum(map(str.isalpha, re.sub(r"[A-Z][A-Z_]*", "", entry)))
