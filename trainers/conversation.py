"""An environment's function by its import path, and one conversation answered by it. Loads neither torch nor vllm.

An environment is a function of an `Episode` that returns text, which the policy then goes on from, or None where the
episode is over:

    def teacher(episode: Episode) -> str | None:
        return None if episode.answer in episode.turns[-1] else "That is not right. Try again."

and is named in the config: `environment.function: "my_tools.py:teacher"`. It is asked after every turn that the policy
has ended by itself. It must depend on the episode alone: which process asks it, and in which order, is nobody's to
know.
"""

import traceback
from collections.abc import Callable
from dataclasses import dataclass

from trainers.reward_functions import Failed


@dataclass(frozen=True)
class Episode:
    """A conversation so far.

    Attributes:
        prompt: the user's message, without the chat template.
        answer: what the reward compares with.
        turns: texts by turns, without special tokens: the policy's, the environment's, and so on; the policy's last.
    """

    prompt: str
    answer: str
    turns: tuple[str, ...]


EnvironmentFunction = Callable[[Episode], str | None]
"""Text that the policy goes on from, or None where the episode is over."""


def answer_episode(functions: dict[str, EnvironmentFunction], episode: Episode) -> str | None | Failed:
    """What the environment says to one episode; whatever is no text and not None is a failure.

    >>> answer_episode({"echo": lambda episode: episode.turns[-1]}, Episode("3+4?", "7", ("7",)))
    '7'
    >>> answer_episode({"odd": lambda episode: 7}, Episode("3+4?", "7", ("7",))).reason
    'it returned 7; an environment returns text, or None where the episode is over'
    """
    ((path, function),) = functions.items()
    try:
        found = function(episode)
    except (Exception, SystemExit):
        return Failed(path, traceback.format_exc())
    if found is not None and not (isinstance(found, str) and found):
        return Failed(path, f"it returned {found!r}; an environment returns text, or None where the episode is over")
    return found
