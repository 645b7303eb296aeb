"""docs/configuration.md: a table for each section of a config, made of the dataclasses and their docstrings.

Only what stands between the two marks is made; the rest of the page is written by hand.
"""

import json
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from trainers.config import EvaluateConfig, GRPOConfig, PPOConfig
from trainers.keys import Key, Section, sections_of

EXPERIMENTS: Mapping[str, type] = {"ppo.py": PPOConfig, "grpo.py": GRPOConfig, "evaluate.py": EvaluateConfig}
"""By script. Of a section that several have, the first one's docstring counts."""
BEGIN, END = "<!-- made by `make reference`: -->\n", "<!-- until here -->\n"


def with_tables(page: str) -> str:
    """The page with its tables made anew.

    Raises:
        ValueError: if a mark is missing.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page needs a line {BEGIN!r} and after it a line {END!r}")
    return before + begin + "\n" + tables() + "\n" + end + after


def tables() -> str:
    """A heading and a table for each section of all experiments, in Markdown."""
    found = {script: sections_of(config_class) for script, config_class in EXPERIMENTS.items()}
    names = dict.fromkeys(name for sections in found.values() for name in sections)
    parts = []
    for name in names:
        having = {script: sections[name] for script, sections in found.items() if name in sections}
        first = next(iter(having.values()))
        rows = [_row(key, _other_defaults(key, having)) for key in first.keys]
        header = ["| key | type | default | unit | meaning |", "|---|---|---|---|---|"]
        parts.append("\n".join([f"## {name}: {first.about}", "", *header, *rows]) + "\n")
    return "\n".join(parts)


def type_of(hint: Any) -> str:
    """What a key takes, as the table shows it.

    >>> type_of(int | None), type_of(Literal["no", "bf16"]), type_of(tuple[float, float])
    ('int or null', '`no`, `bf16`', 'list of 2 float')
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(type_of(argument) for argument in arguments)
    if origin is Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin is list:
        return f"list of {type_of(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)} {type_of(arguments[0])}"
    return {type(None): "null", str: "text"}.get(hint) or hint.__name__


def _other_defaults(first: Key, having: Mapping[str, Section]) -> dict[str, Any]:
    """By script, the key's default where it is another than the first script's."""
    same_key = {script: key for script, section in having.items() for key in section.keys if key.name == first.name}
    return {script: key.default for script, key in same_key.items() if key.default != first.default}


def _row(key: Key, other_defaults: Mapping[str, Any]) -> str:
    defaults = [f"`{_as_yaml(key.default)}`", *(f"`{_as_yaml(o)}` in {script}" for script, o in other_defaults.items())]
    cells = [f"`{key.name}`", type_of(key.hint), "; ".join(defaults), key.unit, key.meaning]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _as_yaml(value: Any) -> str:
    """As it is written in a config: JSON is YAML."""
    return json.dumps(value)
