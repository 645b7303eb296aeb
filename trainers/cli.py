"""The command line of the training scripts: defaults < one YAML file < dotted overrides, all checked before any load.

    torchrun --nproc_per_node=2 scripts/ppo.py configs/ppo_gsm8k.yaml ppo.steps=3 rollout.max_num_seqs=64

jsonargparse reads the YAML and the types. Unknown and repeated keys are found here, ahead of it, so that each message
can name the key, where it stands and the nearest valid one.
"""

import dataclasses
import difflib
import os
import re
import shutil
import sys
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from trainers.checks import check_model, check_world
from trainers.config import Experiment
from trainers.console import RED, painted, set_up_console
from trainers.errors import ConfigError
from trainers.help import WIDEST, help_text
from trainers.keys import accepted

Config = TypeVar("Config", bound=Experiment)

VERBOSE = "--verbose"
YAML_SUFFIXES = (".yaml", ".yml")
PATH_KEYS = {"model.path", "ppo.critic", "data.source", "evaluation.source", "run.directory", "checkpoint.resume"}
WAIT_FOR_FIRST_RANK_S = 5.0


class Given(NamedTuple):
    """A value as the user wrote it. `is_text` is False for a YAML null, number or list written without quotes."""

    text: str
    where: str
    is_text: bool


def run_cli(config_class: type[Config], main: Callable[[Config], None], argv: Sequence[str] | None = None) -> None:
    """Parse the command line, check everything that needs no model, then call `main(config)`.

    A ConfigError, from here or from `main`, becomes one paragraph on stderr and exit code 1. With `--dry-run` the
    tokenizer and the data are read too and the resolved config goes to stdout; `main` is not called. With `--verbose`
    the libraries say what they like (trainers/console.py).

    Args:
        argv: without the script's name; None takes the process's own.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    set_up_console(VERBOSE in argv, is_main=os.environ.get("RANK", "0") == "0")
    try:
        config, dry_run = parse(config_class, argv)
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        check_world(config, world_size)
        check_model(config, world_size)
        if not dry_run:
            main(config)
        elif _local_rank() == 0:
            summary = _check_data(config, world_size)
            print(dump(config), end="")
            print(summary, file=sys.stderr)
    except ConfigError as error:
        _exit_with(error)


def parse(config_class: type[Config], argv: Sequence[str]) -> tuple[Config, bool]:
    """Resolve a command line into a config and whether `--dry-run` was given.

    Args:
        config_class: a dataclass whose fields are dataclasses, the sections.
        argv: at most one YAML file, any number of `section.key=value` (or `--section.key=value`), `--dry-run`,
            `--verbose` (of no concern here), `--help` with sections or keys to show, or none; of two overrides of one
            key the later one holds.

    Raises:
        ConfigError: for an unknown or repeated key, a wrong type, a number out of range, a contradiction.
        SystemExit: after printing the help.

    >>> from trainers.config import PPOConfig
    >>> config, dry_run = parse(PPOConfig, ["rollout.max_num_seqs=64", "--dry-run"])
    >>> config.rollout.max_num_seqs, dry_run
    (64, True)
    >>> parse(PPOConfig, ["rollout.max_num_seq=64"])
    Traceback (most recent call last):
    ...
    trainers.errors.ConfigError: rollout.max_num_seq (on the command line) is not a key; did you mean \
rollout.max_num_seqs? `--help` lists all keys
    """
    argv = list(argv)
    keys = _keys(config_class)
    if "--help" in argv or "-h" in argv:
        if _local_rank() == 0:
            only = [word for word in argv if word in keys or word in typing.get_type_hints(config_class)]
            width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDEST
            print(help_text(config_class, only, width), end="")
        raise SystemExit(0)
    dry_run = "--dry-run" in argv
    paths = [word for word in argv if word.endswith(YAML_SUFFIXES) and "=" not in word]
    if len(paths) > 1:
        raise ConfigError(
            f"got {len(paths)} YAML files ({', '.join(paths)}); give one, and section.key=value for the rest"
        )
    overrides = _read_overrides([word for word in argv if word not in (*paths, "--dry-run", VERBOSE)], keys)
    from_file = _read_yaml(paths[0], keys) if paths else {}
    # The file by itself first: an error then blames the file, even for a key that is overridden.
    file_arguments = ["--config", paths[0]] if from_file else []
    parsed = _parse_types(config_class, file_arguments, from_file, keys)
    if overrides:
        override_arguments = [f"--{key}={given.text}" for key, given in overrides.items()]
        parsed = _parse_types(config_class, file_arguments + override_arguments, from_file | overrides, keys)
    _expand_homes(parsed, keys)
    try:
        sections = {name: _section(hint, parsed[name]) for name, hint in typing.get_type_hints(config_class).items()}
        return config_class(**sections), dry_run
    except ConfigError:
        raise
    except ValueError as error:  # the range checks of rollout's own dataclasses
        raise ConfigError(str(error)) from error


def dump(config: Any) -> str:
    """The config as YAML, every key written out; `parse` of it gives the same config back.

    >>> from trainers.config import PPOConfig
    >>> print(*dump(PPOConfig()).splitlines()[:3], sep="\\n")
    model:
      path: "models/smollm2-135m-tp2"
      dtype: "float32"
    """
    return yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes every string value, so that text such as "1e-5" or "null" is read back as text."""

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        node = super().represent_mapping(tag, mapping, flow_style)
        for key, _ in node.value:
            key.style = None
        return node


_Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def _keys(config_class: type) -> dict[str, Any]:
    """Each dotted key with its type."""
    return {
        f"{section}.{key}": hint
        for section, section_class in typing.get_type_hints(config_class).items()
        for key, hint in typing.get_type_hints(section_class).items()
    }


def _section(section_class: type, values: Any) -> Any:
    return section_class(**{key: values[key] for key in typing.get_type_hints(section_class)})


def _parse_types(config_class: type, arguments: list[str], given: dict[str, Given], keys: dict[str, Any]) -> Any:
    """Let jsonargparse read the values; `given` holds them as written, for the messages."""
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_argument("--config", action="config")
    for section, section_class in typing.get_type_hints(config_class).items():
        parser.add_class_arguments(section_class, section)
        defaults = getattr(config_class(), section)  # an experiment may have others than the section by itself
        keys_of_section = [key.name for key in dataclasses.fields(section_class)]
        parser.set_defaults({f"{section}.{key}": getattr(defaults, key) for key in keys_of_section})
    try:
        parsed = parser.parse_args(arguments)
    except (ArgumentError, TypeError, ValueError) as error:
        match = re.search(r'key "([\w.]+)"', str(error))
        if match is None or match[1] not in given:
            raise ConfigError(f"the config cannot be read: {error}") from error
        key = match[1]
        text, where, _ = given[key]
        quotes = f'; put it in quotes: "{text}"' if keys[key] in (str, str | None) else ""
        raise ConfigError(f"{key} ({where}) is {text}; it must be {accepted(keys[key])}{quotes}") from error
    for key, value in given.items():
        # jsonargparse reads an optional text as YAML once more: "# Role: ..." would be a comment, and become null.
        if value.is_text and keys[key] == str | None:
            parsed[key] = value.text
    return parsed


def _expand_homes(parsed: Any, keys: dict[str, Any]) -> None:
    """Put the user's home in place of a `~` that begins a path: a shell does so for words of its own alone."""
    for key in PATH_KEYS & keys.keys():
        if parsed[key] is not None:
            parsed[key] = os.path.expanduser(parsed[key])


def _read_overrides(words: list[str], keys: dict[str, Any]) -> dict[str, Given]:
    given = {}
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            if key in keys:
                raise ConfigError(f"{word} has no value; write {key}=VALUE, where VALUE is {accepted(keys[key])}")
            raise ConfigError(
                f"{word!r} is neither a YAML file nor section.key=value nor --dry-run, --verbose or --help"
                f"{_nearest(key, keys)}"
            )
        _refuse_unknown(key, keys, "on the command line")
        given[key] = Given(value, "on the command line", value not in ("null", "~"))
    return given


def _read_yaml(path: str, keys: dict[str, Any]) -> dict[str, Given]:
    """Every key of a YAML file as written, with its line; refuses unknown and repeated ones."""
    file = Path(path)
    try:
        source = file.read_text(encoding="utf-8")
        root = yaml.compose(source, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        others = ", ".join(sorted(str(other) for other in file.parent.glob("*.y*ml")))
        raise ConfigError(f"cannot read {path}: {error}" + (f"; there are {others}" if others else "")) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    given: dict[str, Given] = {}
    for key, node in _leaves(root, "", keys, path, set()):
        where = f"{path}, line {node.start_mark.line + 1}"
        is_scalar = isinstance(node, yaml.ScalarNode)
        text = node.value if is_scalar else source[node.start_mark.index : node.end_mark.index].strip()
        given[key] = Given(text, where, is_scalar and node.tag == "tag:yaml.org,2002:str")
    return given


def _leaves(node: Any, prefix: str, keys: dict[str, Any], path: str, seen: set[str]) -> Iterator[tuple[str, Any]]:
    if node is None:  # an empty file
        return
    if not isinstance(node, yaml.MappingNode):
        what = f"{prefix.rstrip('.')} is a section" if prefix else "a config file holds sections"
        raise ConfigError(f"{what} ({path}, line {node.start_mark.line + 1}); write `key: value` lines below")
    for key_node, value in node.value:
        key = f"{prefix}{key_node.value}"
        where = f"{path}, line {key_node.start_mark.line + 1}"
        if key in seen:  # YAML readers would silently drop the first one
            raise ConfigError(f"{key} ({where}) stands twice in the file; merge the two")
        seen.add(key)
        if prefix or key not in {known.partition(".")[0] for known in keys}:
            _refuse_unknown(key, keys, where)
            yield key, value
        else:
            yield from _leaves(value, f"{key}.", keys, path, seen)


def _refuse_unknown(key: str, keys: dict[str, Any], where: str) -> None:
    if key not in keys:
        raise ConfigError(f"{key} ({where}) is not a key{_nearest(key, keys)}")


def _nearest(key: str, keys: dict[str, Any]) -> str:
    """The end of a message: the keys the user may have meant."""
    section, _, name = key.rpartition(".")
    in_section = [known for known in keys if known.startswith(f"{key}.")]
    if in_section:
        return f" but a section: set {', '.join(in_section)}"
    sections = dict.fromkeys(known.partition(".")[0] for known in keys)
    names = {known.partition(".")[2]: known for known in keys}
    best = [known for known in keys if known.endswith(f".{name}")]  # the right name, in another section or in none
    if section and best:
        best = difflib.get_close_matches(key, best, n=1, cutoff=0)
    elif section in sections:
        near = difflib.get_close_matches(name, [known for known in names if f"{section}.{known}" in keys], n=1)
        best = [f"{section}.{match}" for match in near]
    elif not section and not best:
        best = difflib.get_close_matches(key, sections, n=1)
    best = best or [names[match] for match in difflib.get_close_matches(name, names, n=1)]
    if best:
        return f"; did you mean {' or '.join(best)}? `--help` lists all keys"
    group = [known for known in keys if known.startswith(f"{section}.")] or list(sections)
    return f"; there are {', '.join(group)} (`--help` lists all keys)"


def _check_data(config: Experiment, world_size: int) -> str:
    """Read the tokenizer and the data, as the run would."""
    from trainers.environment import Environment
    from trainers.prepare import prepare
    from trainers.reward_functions import load_functions

    found = prepare(config, world_size)
    load_functions(config.reward.paths)
    Environment(dataclasses.replace(config.environment, workers=0), found.tokenizer)
    longest = max(len(example.prompt_ids) for example in [*found.training, *found.evaluation])
    return (
        f"The config is sound: {len(found.training)} prompts to train on and {len(found.evaluation)} to evaluate on, "
        f"of at most {longest} tokens. Nothing was trained (--dry-run)."
    )


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _exit_with(error: ConfigError) -> NoReturn:
    """Print the message once a node and exit with code 1.

    torchrun ends the other ranks as soon as one exits. So the others wait, lest they exit before rank 0 has printed;
    a rank that is still there afterwards met the error alone, and prints it.
    """
    if _local_rank() != 0:
        time.sleep(WAIT_FOR_FIRST_RANK_S)
    print(f"{painted('error:', RED, sys.stderr)} {error}", file=sys.stderr, flush=True)
    raise SystemExit(1)
