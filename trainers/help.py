"""What `--help` prints: every key by section, to the width of the terminal."""

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import yaml

from trainers.keys import Key, accepted, sections_of

NARROWEST, WIDEST = 60, 120


def help_text(config_class: type, only: Sequence[str] = (), width: int = WIDEST) -> str:
    """Every key by section: what it accepts, its default and what it does (from the docstrings).

    Args:
        config_class: of the experiment.
        only: sections and keys to show; none shows all of them.
        width: of a line, in columns; between NARROWEST and WIDEST.

    >>> from trainers.config import PPOConfig
    >>> print(help_text(PPOConfig, ["sampling.n"]), end="")
    sampling: how responses are drawn
      sampling.n=1  (a whole number, responses)
          responses a prompt.
    """
    width = min(max(width, NARROWEST), WIDEST)
    lines = [] if only else _usage(list(sections_of(config_class)), width)
    for name, section in sections_of(config_class).items():
        keys = [key for key in section.keys if not only or name in only or key.name in only]
        if keys:
            lines += ["", *textwrap.wrap(f"{name}: {section.about}", width, subsequent_indent="  ")]
            lines += [line for key in keys for line in _of_key(key, width)]
    return "\n".join(lines).lstrip("\n") + "\n"


def _usage(sections: Sequence[str], width: int) -> list[str]:
    program = f"scripts/{Path(sys.argv[0]).name}"
    paragraphs = [
        f"usage: torchrun --nproc_per_node=2 {program} [configs/NAME.yaml] [section.key=value ...] [--dry-run] "
        "[--verbose]",
        f"       python {program} --help [SECTION | section.key ...]",
        "",
        "Defaults < the YAML file < section.key=value. --dry-run checks and prints the resolved config; --verbose "
        "shows what the libraries say, on every rank.",
        'null is None. A list that holds text needs quotes: section.key=\'["a", "b"]\'.',
        f"Sections: {', '.join(sections)}. The same as a page: docs/configuration.md.",
    ]
    return [line for text in paragraphs for line in textwrap.wrap(text, width, subsequent_indent="  ") or [""]]


def _of_key(key: Key, width: int) -> list[str]:
    default = yaml.safe_dump(key.default, default_flow_style=True, width=1000).split("\n")[0]
    takes = ", ".join(filter(None, [accepted(key.hint), key.unit]))
    head, meaning = f"  {key.name}={default}  ({takes})", key.meaning
    return [
        *textwrap.wrap(head, width, subsequent_indent=" " * 6),
        *textwrap.wrap(meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6),
    ]
