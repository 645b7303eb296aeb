"""Collected: a phase's tokens, put in their rows step by step."""

from types import SimpleNamespace

import numpy as np
import pytest

from rollout.driver import LENGTH, STOP, Collected

ABORT = 2


def update(
    request_ids: list[str], token_ids: list[int], logprobs: list[float], finished: tuple[tuple[int, int], ...] = ()
) -> SimpleNamespace:
    """As rollout.backend.scheduler.StepUpdate, whose module imports vLLM."""
    return SimpleNamespace(
        request_ids=request_ids,
        token_ids=np.array(token_ids, np.int32),
        logprobs=np.array(logprobs, np.float32),
        finished=list(finished),
    )


def test_tokens_go_to_their_rows_in_any_order() -> None:
    collected = Collected.empty(3, 4)
    both = ["2", "0"]
    collected.add(update(both, [7, 8], [-0.5, -0.25]))
    collected.add(update(both, [9, 10], [-1.0, -2.0]))
    collected.add(update(["1", "0"], [5, 6], [-3.0, -4.0]))
    assert collected.lengths.tolist() == [3, 1, 2]
    assert collected.token_ids.tolist() == [[8, 10, 6, 0], [5, 0, 0, 0], [7, 9, 0, 0]]
    assert collected.logprobs[0, :3].tolist() == [-0.25, -2.0, -4.0]


def test_a_stop_is_finished_and_a_length_limit_is_cut() -> None:
    collected = Collected.empty(3, 2)
    collected.add(update(["0", "1", "2"], [1, 2, 3], [0.0] * 3, ((0, STOP), (2, LENGTH))))
    assert collected.done.tolist() == [True, False, True]
    assert collected.finished.tolist() == [True, False, False]


def test_any_other_end_is_an_error_that_names_the_sequence() -> None:
    collected = Collected.empty(2, 2)
    with pytest.raises(RuntimeError, match="sequence 1 ended for reason 2"):
        collected.add(update(["0", "1"], [1, -1], [0.0, np.nan], ((1, ABORT),)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_logprob_that_is_no_number_is_an_error_that_names_the_token(bad: float) -> None:
    collected = Collected.empty(2, 2)
    collected.add(update(["0", "1"], [1, 2], [-0.5, -0.5]))
    with pytest.raises(FloatingPointError, match=f"token 1 of sequence 1 has the log-prob {bad}"):
        collected.add(update(["0", "1"], [1, 2], [-0.5, bad]))


def test_a_step_without_tokens_changes_nothing() -> None:
    collected = Collected.empty(1, 2)
    before = collected.digest()
    collected.add(update([], [], []))
    assert collected.digest() == before


def test_the_digest_is_of_tokens_logprobs_and_lengths() -> None:
    digests = set()
    for token, logprob in ((1, -0.5), (2, -0.5), (1, -0.25)):
        collected = Collected.empty(1, 2)
        collected.add(update(["0"], [token], [logprob]))
        digests.add(collected.digest())
    assert len(digests) == 3
