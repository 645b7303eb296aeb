"""A step's sampled tokens as one array, in the clothes that vLLM's scheduler expects."""

from collections.abc import Sequence
from typing import overload

import numpy as np


class SampledTokens(Sequence[list[int]]):
    """Stands where vLLM has a list of lists: row r reads as [token], or as [] where the row's token does not count.

    vLLM's own scheduler indexes it; ours takes the arrays, and no Python object is made for a token.

    Args:
        token_ids: (rows,) int32 or int64, in the model runner's batch order.
        valid: (rows,) bool; True where the token counts, False for a chunk of a prompt that has not ended. None: all
        do.

    >>> tokens = SampledTokens(np.array([7, 8]), np.array([True, False]))
    >>> list(tokens), tokens.token_ids.tolist()
    ([[7], []], [7, 8])
    """

    def __init__(self, token_ids: np.ndarray, valid: np.ndarray | None = None) -> None:
        assert token_ids.ndim == 1, token_ids.shape
        self.token_ids = token_ids
        self.valid = valid

    def __len__(self) -> int:
        return len(self.token_ids)

    @overload
    def __getitem__(self, row: int) -> list[int]: ...
    @overload
    def __getitem__(self, row: slice) -> list[list[int]]: ...
    def __getitem__(self, row: int | slice) -> list[int] | list[list[int]]:
        if isinstance(row, slice):
            return [self[index] for index in range(*row.indices(len(self)))]
        if self.valid is not None and not self.valid[row]:
            return []
        return [int(self.token_ids[row])]


def sampled_tokens(token_ids: Sequence[Sequence[int]]) -> SampledTokens:
    """vLLM's list of lists, at most one token a row, as a SampledTokens.

    >>> list(sampled_tokens([[7], []]))
    [[7], []]
    """
    if isinstance(token_ids, SampledTokens):
        return token_ids
    valid = np.fromiter(map(bool, token_ids), bool, len(token_ids))
    tokens = np.fromiter((row[0] if row else 0 for row in token_ids), np.int32, len(token_ids))
    return SampledTokens(tokens, None if valid.all() else valid)
