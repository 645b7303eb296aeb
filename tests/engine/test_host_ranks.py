"""Many ranks' schedulers in one process: they do what one alone does, in step with their tensor-parallel group."""

from pathlib import Path

import numpy as np
import pytest

BATCH, PROMPT, TOKENS = 12, 200, 100


@pytest.fixture(scope="module")
def config(small_vocabulary_model_path: Path):  # noqa: ANN201
    import rollout.backend  # noqa: F401  sets vLLM's environment first
    from rollout.backend.host_ranks import host_config

    return host_config(str(small_vocabulary_model_path), PROMPT + TOKENS, BATCH, 512)


def test_ranks_side_by_side_do_what_one_does_alone(config) -> None:  # noqa: ANN001
    from rollout.backend.host_ranks import HostRank, group_of_one, run_ranks, steady_costs, tensor_parallel_boards

    group, prompts = group_of_one(), [PROMPT] * BATCH
    [alone] = [HostRank(config, board, 1e-4, group) for board in tensor_parallel_boards(1)]
    many = [HostRank(config, board, 1e-4, group) for _ in range(2) for board in tensor_parallel_boards(3)]
    run_ranks([alone], prompts, TOKENS)
    run_ranks(many, prompts, TOKENS)
    for rank in (alone, *many):
        assert rank.is_done and (rank.collected.lengths == TOKENS).all()
        assert np.array_equal(rank.collected.token_ids, alone.collected.token_ids)
        assert rank.collected.token_ids[0].tolist() == [(PROMPT + place) % 1000 + 10 for place in range(TOKENS)]
        assert rank.scheduled_tokens == alone.scheduled_tokens
        costs = steady_costs(rank, BATCH)
        assert len(costs) >= TOKENS - 6 and min(costs) > 0, "the prompts take five steps, 512 tokens each"


def test_a_rank_waits_for_its_group(config) -> None:  # noqa: ANN001
    """A step of a device starts when every rank of the group has launched it: one rank alone never ends it."""
    from rollout.backend import virtual_device
    from rollout.backend.host_ranks import HostRank, group_of_one, run_ranks, tensor_parallel_boards

    first, _ = (HostRank(config, board, 1e-4, group_of_one()) for board in tensor_parallel_boards(2))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TimeoutError, match=r"ranks \[1\] of the group"):
        patch.setattr(virtual_device, "PATIENCE_S", 0.05)
        run_ranks([first], [PROMPT], TOKENS)
