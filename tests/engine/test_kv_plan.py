"""The planner's bytes of the KV cache are vLLM's own."""

import pytest
import torch

from tests.unit.test_activations import MODELS
from trainers.memory_plan import Cache, kv_token_bytes
from trainers.model_sizes import count


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("block", [16, 128])
def test_a_block_has_vllms_size(tp: int, block: int) -> None:
    import rollout.backend  # noqa: F401  sets vLLM's environment first

    from vllm.v1.kv_cache_interface import FullAttentionSpec  # isort: skip

    sizes = count(MODELS["llama"][1])
    heads = max(1, sizes.kv_heads // tp)  # vLLM's ModelConfig.get_num_kv_heads
    layer = FullAttentionSpec(block_size=block, num_kv_heads=heads, head_size=sizes.head_dim, dtype=torch.bfloat16)
    token_bytes = kv_token_bytes(sizes, tp, element=2)
    assert token_bytes * block == sizes.layers * layer.page_size_bytes
    assert Cache(token_bytes, block, 50 * token_bytes * block + 1).blocks == 49, "one of 50 is vLLM's own"
