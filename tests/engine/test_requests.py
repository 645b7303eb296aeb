"""From what is asked for to vLLM's requests: the seeds of sequences that go on, by who samples them."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import rollout.backend.core as core_module
from rollout.backend.core import continued_seed, make_requests
from rollout.config import SamplingConfig
from rollout.types import Asked

STREAM = 12345


def core(v2_model_runner: bool) -> Any:
    """As far as requests are made of it."""
    model_config = SimpleNamespace(
        try_get_generation_config=dict, hf_text_config=SimpleNamespace(eos_token_id=2), get_vocab_size=lambda: 512
    )
    config = SimpleNamespace(model_config=model_config, use_v2_model_runner=v2_model_runner)
    return SimpleNamespace(engine_core=SimpleNamespace(vllm_config=config, request_block_hasher=None))


@pytest.mark.parametrize(
    ("on_cpu", "v2_model_runner", "counts_from_start"),
    [(True, False, False), (False, False, True), (False, True, False)],
)
def test_a_sequence_that_goes_on_has_its_own_stream_where_draws_are_told_by_position(
    monkeypatch: pytest.MonkeyPatch, on_cpu: bool, v2_model_runner: bool, counts_from_start: bool
) -> None:
    """Only where draws are counted from the request's start it needs another seed, or it would repeat its first."""
    monkeypatch.setattr(core_module.current_platform, "is_cpu", lambda: on_cpu, raising=False)
    asked = [
        Asked(np.arange(10, 15, dtype=np.int32), samples=1, max_tokens=8, stream=STREAM),
        Asked(np.arange(10, 15, dtype=np.int32), samples=1, max_tokens=8),
    ]
    goes_on, begins = make_requests(core(v2_model_runner), asked, SamplingConfig(max_tokens=8), [STREAM, STREAM])
    assert begins.sampling_params.seed == STREAM
    assert goes_on.sampling_params.seed == (continued_seed(STREAM, 5) if counts_from_start else STREAM)
