"""The project's pages: their blocks, the commands in these, their links and their code spans."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.launch import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "configs" / "README.md",
    ROOT / "requirements" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
TOOLS = ("make", "torchrun", "python", "python3.11", "wandb", "pip", "pre-commit", "export", "sbatch", "kubectl")
"""What a line that is a command begins with, less the path before it."""


@dataclass(frozen=True)
class Block:
    """Fenced, or indented by four after an empty line.

    Attributes:
        page: relative to the root.
        language: of a fence; "" of one without, and of an indented block.
    """

    page: str
    language: str
    text: str

    @property
    def first_line(self) -> str:
        return self.text.splitlines()[0]

    def commands(self) -> list[list[str]]:
        """Words of the lines that are commands; lines that end in a backslash are joined, comments left out."""
        lines = self.text.replace("\\\n", " ").splitlines()
        found = [shlex.split(line, comments=True) for line in lines if tool_of(line.split(" ")[0]) in TOOLS]
        return [part for words in found for part in split_at_and(words)]


def split_at_and(words: list[str]) -> Iterator[list[str]]:
    """The commands of a line that joins them with &&."""
    while "&&" in words:
        yield words[: words.index("&&")]
        words = words[words.index("&&") + 1 :]
    yield words


def tool_of(word: str) -> str:
    """Without the folder of the environment."""
    return word.removeprefix(".venv/bin/")


def blocks_of(page: Path) -> Iterator[Block]:
    """All of them, in order."""
    name, fence, lines = str(page.relative_to(ROOT)), None, []
    previous = ""
    for line in [*page.read_text(encoding="utf-8").splitlines(), ""]:
        if fence is None and line.startswith("```"):
            fence, lines = line[3:], []
        elif fence is not None:
            if line == "```":
                yield Block(name, fence, "\n".join(lines))
                fence, lines = None, []
            else:
                lines.append(line)
        elif line.startswith("    ") and (lines or not previous.strip()):
            lines.append(line[4:])
        elif lines and line.strip():
            yield Block(name, "", "\n".join(lines).rstrip())
            lines = []
        elif lines:
            lines.append("")
        previous = line
    if lines:
        yield Block(name, "", "\n".join(lines).rstrip())


def prose_of(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def spans_of(page: Path) -> list[str]:
    """What stands in backquotes, one line each."""
    return [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose_of(page))]


def anchors_of(page: Path) -> set[str]:
    """What links can point at: headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
