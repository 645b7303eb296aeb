"""Responses that a step does not wait for: this rank's groups in the making, and what a checkpoint keeps of them.

A step's fresh prompts and the rows that were carried are generated together, each with the same allowance of tokens
(`partial.tokens_per_step`): a count, so that all ranks cut at the same places. A group is trained on when its last row
is done. In the step in which a group has reached `partial.max_age` its rows have no allowance, and end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from rollout import Draft
from trainers.config import PartialConfig
from trainers.data import Example
from trainers.environment import drafts_of


@dataclass
class Started:
    """A prompt whose responses are being generated.

    Attributes:
        step: in which they began.
        drafts: its rows, done or not; they share the prompt's array.
    """

    example: Example
    step: int
    drafts: list[Draft]


class Unfinished:
    """This rank's groups in the making, oldest first.

    Args:
        config: allowance and oldest age.
        examples: all of the run, as every rank has them: a checkpoint names them by their numbers.
    """

    def __init__(self, config: PartialConfig, examples: Sequence[Example]) -> None:
        self._config = config
        self._examples = examples
        self.groups: list[Started] = []

    @property
    def num_rows(self) -> int:
        """Rows that are not done."""
        return sum(not draft.done for group in self.groups for draft in group.drafts)

    def begin(self, examples: Sequence[Example], n: int, step: int) -> tuple[list[Draft], list[Example]]:
        """Take fresh prompts in, and allow every row that is not done its tokens of the step.

        Returns:
            The rows; and the prompts into which their `prompt_index` is.
        """
        drafts = drafts_of(examples, n)
        for index, example in enumerate(examples):
            self.groups.append(Started(example, step, drafts[index * n : (index + 1) * n]))
        rows = []
        for index, group in enumerate(self.groups):
            is_last = step - group.step >= self._config.max_age
            for draft in group.drafts:
                draft.prompt_index = index
                draft.allowance = None if is_last else self._config.tokens_per_step
            rows += [draft for draft in group.drafts if not draft.done]
        return rows, [group.example for group in self.groups]

    def take_complete(self) -> tuple[list[Draft], list[Example]]:
        """The groups whose rows are all done, which go; numbered anew, as `begin` numbers them."""
        complete = [group for group in self.groups if all(draft.done for draft in group.drafts)]
        self.groups = [group for group in self.groups if not all(draft.done for draft in group.drafts)]
        for index, group in enumerate(complete):
            for draft in group.drafts:
                draft.prompt_index = index
        return [draft for group in complete for draft in group.drafts], [group.example for group in complete]

    def to_bytes(self) -> bytes:
        """The groups of all ranks, for a checkpoint: safetensors; a collective. Empty if nobody has any."""
        everyones: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, self._arrays())
        if not any(len(arrays["example"]) for arrays in everyones):
            return b""
        ranks = [np.full(len(arrays["example"]), rank, np.int32) for rank, arrays in enumerate(everyones)]
        joined = {name: np.concatenate([arrays[name] for arrays in everyones]) for name in everyones[0]}
        return save_arrays(joined | {"rank": np.concatenate(ranks), "ranks": np.array([len(everyones)], np.int32)})

    def from_bytes(self, content: bytes, rank: int, world_size: int) -> None:
        """Take this rank's groups over; where the job had another number of ranks they are dealt out in turn.

        Raises:
            Exception: of some kind, if the content is none of `to_bytes`.
        """
        if not content:
            return
        arrays = load_arrays(content)
        same = int(arrays["ranks"][0]) == world_size
        rows = np.split(np.arange(len(arrays["done"])), np.cumsum(arrays["rows"])[:-1])
        ends = np.cumsum(arrays["length"])
        for number, (example, step) in enumerate(zip(arrays["example"], arrays["step"], strict=True)):
            if (arrays["rank"][number] if same else number % world_size) != rank:
                continue
            group = Started(self._examples[example], int(step), drafts_of([self._examples[example]], len(rows[number])))
            for draft, row in zip(group.drafts, rows[number].tolist(), strict=True):
                tokens = slice(ends[row] - arrays["length"][row], ends[row])
                for name in PER_TOKEN:
                    setattr(draft, name, arrays[name][tokens])
                draft.stream, draft.turns = int(arrays["stream"][row]), int(arrays["turns"][row])
                draft.finished, draft.done = bool(arrays["finished"][row]), bool(arrays["done"][row])
            self.groups.append(group)

    def _arrays(self) -> dict[str, np.ndarray]:
        """This rank's: by group, by row, and by token, one after another."""
        numbers = {id(example): number for number, example in enumerate(self._examples)}
        drafts = [draft for group in self.groups for draft in group.drafts]

        def column(values: list, dtype: type) -> np.ndarray:
            return np.array(values, dtype)

        return {
            "example": column([numbers[id(group.example)] for group in self.groups], np.int64),
            "step": column([group.step for group in self.groups], np.int64),
            "rows": column([len(group.drafts) for group in self.groups], np.int64),
            "stream": column([draft.stream for draft in drafts], np.int64),
            "turns": column([draft.turns for draft in drafts], np.int64),
            "finished": column([draft.finished for draft in drafts], bool),
            "done": column([draft.done for draft in drafts], bool),
            "length": column([len(draft.response_ids) for draft in drafts], np.int64),
        } | {
            name: np.concatenate([np.zeros(0, dtype), *(getattr(draft, name) for draft in drafts)])
            for name, dtype in PER_TOKEN.items()
        }


PER_TOKEN = {"response_ids": np.int32, "logprobs": np.float32, "generated": bool, "versions": np.int32}
"""What a draft has of each token."""
