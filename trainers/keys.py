"""Every key of a config, read off the dataclasses: its type, default, unit and meaning stand there alone.

The unit is what Google's docstring style has in parentheses behind the name, `size (GiB): ...`, else `UNITS` has it.
"""

import types
import typing
from typing import Any, Literal, NamedTuple

import docstring_parser

# Of numbers, by the key's name, or its end where that begins with "_".
UNITS = {
    "_gib": "GiB",
    "_ms": "milliseconds",
    "_s": "seconds",
    "_steps": "steps",
    "_tokens": "tokens",
    "block_size": "tokens",
    "epochs": "passes",
    "every": "steps",
    "gpu_memory_utilization": "share",
    "held_out": "share",
    "k": "responses",
    "keep": "checkpoints",
    "max_model_len": "tokens",
    "max_num_seqs": "sequences",
    "minibatches": "updates",
    "n": "responses",
    "oversample": "generations",
    "prompts": "prompts",
    "prompts_per_step": "prompts",
    "steps": "steps",
    "tensor_parallel_size": "ranks",
    "top_k": "tokens",
    "workers": "processes",
}


class Key(NamedTuple):
    """One key.

    Attributes:
        name: section.key.
        hint: its type, as annotated.
        default: in this experiment.
        unit: of a number; "" where it has none.
        meaning: in one line; "" where the docstring has nothing.
    """

    name: str
    hint: Any
    default: Any
    unit: str
    meaning: str


class Section(NamedTuple):
    """The keys of one dataclass, in its order, and what it is about."""

    about: str
    keys: list[Key]


def sections_of(config_class: type) -> dict[str, Section]:
    """Every section of an experiment by its name, in the experiment's order.

    >>> from trainers.config import PPOConfig
    >>> sections_of(PPOConfig)["rollout"].keys[3][:4]
    ('rollout.max_model_len', <class 'int'>, 1024, 'tokens')
    """
    defaults, about_sections = config_class(), _parameters(config_class)
    return {
        section: Section(
            _meaning(about_sections.get(section)), _keys_of(section, section_class, getattr(defaults, section))
        )
        for section, section_class in typing.get_type_hints(config_class).items()
    }


def accepted(hint: Any) -> str:
    """What a type takes, in words.

    >>> accepted(int | None), accepted(Literal["no", "bf16"]), accepted(list[str])
    ('a whole number or null', 'no or bf16', 'a list of texts, as ["a", "b"]')
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(accepted(argument) for argument in arguments)
    if origin is Literal:
        return " or ".join(str(argument) for argument in arguments)
    if origin is list:
        example = '["a", "b"]' if arguments[0] is str else "[1, 2]"
        return f"a list of {accepted(arguments[0]).removeprefix('a ')}s, as {example}"
    if origin is tuple:
        return f"a list of {len(arguments)} {accepted(arguments[0]).removeprefix('a ')}s, as [0.9, 0.95]"
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    return words.get(hint, str(hint))


def _keys_of(section: str, section_class: type, defaults: Any) -> list[Key]:
    documented = _parameters(section_class)
    return [
        Key(
            name=f"{section}.{key}",
            hint=hint,
            default=getattr(defaults, key),
            unit=_unit(key, hint, documented.get(key)),
            meaning=_meaning(documented.get(key)),
        )
        for key, hint in typing.get_type_hints(section_class).items()
    ]


def _parameters(documented: type) -> dict[str, docstring_parser.DocstringParam]:
    """Of a dataclass's docstring and of those that it extends."""
    docstrings = [docstring_parser.parse(owner.__doc__ or "") for owner in reversed(documented.__mro__)]
    return {param.arg_name: param for docstring in docstrings for param in docstring.params}


def _meaning(param: docstring_parser.DocstringParam | None) -> str:
    return " ".join((param.description or "").split()) if param else ""


def _unit(key: str, hint: Any, param: docstring_parser.DocstringParam | None) -> str:
    if param is not None and param.type_name:
        return param.type_name
    if not {int, float} & {hint, *typing.get_args(hint)}:
        return ""
    endings = (unit for end, unit in UNITS.items() if end.startswith("_") and key.endswith(end))
    return UNITS.get(key) or next(endings, "")
