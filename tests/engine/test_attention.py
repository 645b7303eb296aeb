"""The paged attention kernel: right, vLLM's cache layout, and the same row whatever surrounds it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm._custom_ops as vllm_ops
from vllm.config import set_current_vllm_config
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from rollout.backend.attention import PagedAttention, Step, attend, is_plain_attention
from rollout.backend.native import load_library
from tests.engine.scheduler_pair import base_config


@dataclass
class Batch:
    """Several sequences, each with `rows` new tokens at the end of `lengths` in all, and a cache that holds the rest.

    What no token stands in is NaN, in the cache as in memory that was never written.
    """

    lengths: list[int]
    rows: list[int]
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 32
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        num_blocks = [-(-length // self.block_size) for length in self.lengths]
        numbers = torch.randperm(sum(num_blocks), generator=generator).int().split(num_blocks)
        self.block_table = torch.nn.utils.rnn.pad_sequence(list(numbers), batch_first=True)
        self.seq_lens = torch.tensor(self.lengths, dtype=torch.int32)
        self.query_start_loc = torch.tensor([0, *self.rows]).cumsum(0).int()
        tokens = sum(self.rows)
        # As the projection leaves them: side by side.
        packed = normal(tokens, self.heads + 2 * self.kv_heads, self.head_dim)
        self.query, self.key, self.value = packed.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        self.keys = [normal(length, self.kv_heads, self.head_dim) for length in self.lengths]
        self.values = [normal(length, self.kv_heads, self.head_dim) for length in self.lengths]
        for s, (start, end) in enumerate(self.spans()):
            self.keys[s][self.lengths[s] - self.rows[s] :] = self.key[start:end]
            self.values[s][self.lengths[s] - self.rows[s] :] = self.value[start:end]
        shape = (sum(num_blocks), self.kv_heads, self.block_size, 2 * self.head_dim)
        self.kv_cache = torch.full(shape, torch.nan, dtype=self.dtype)
        self._fill(self.kv_cache, with_rows=False)
        self.slot_mapping = torch.cat([self._slots(s, rows) for s, rows in enumerate(self.rows)])

    def spans(self) -> list[tuple[int, int]]:
        starts = self.query_start_loc.tolist()
        return list(zip(starts, starts[1:], strict=False))

    def halves(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the cache as vLLM's operators take them."""
        key_cache, value_cache = kv_cache.view(len(kv_cache), self.kv_heads, 2 * self.block_size, -1).chunk(2, dim=2)
        return key_cache, value_cache

    def attend(self) -> torch.Tensor:
        """(tokens, heads, head_dim) by our kernel, which writes to `kv_cache`."""
        step = Step(heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim, scale=self.head_dim**-0.5)
        output = torch.full(self.query.shape, torch.nan, dtype=self.dtype)
        attend(load_library("attention"), step, self.query, self.key, self.value, self.kv_cache, self, output)
        return output

    def exact(self) -> torch.Tensor:
        """The same in float64."""
        outputs = []
        for s, (start, end) in enumerate(self.spans()):
            length, rows, group = self.lengths[s], self.rows[s], self.heads // self.kv_heads
            keys = self.keys[s].double().repeat_interleave(group, 1)
            values = self.values[s].double().repeat_interleave(group, 1)
            scores = torch.einsum("qhd,khd->hqk", self.query[start:end].double(), keys) * self.head_dim**-0.5
            later = torch.arange(length)[None, :] > torch.arange(length - rows, length)[:, None]
            weights = scores.masked_fill(later, -torch.inf).softmax(-1)
            outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
        return torch.cat(outputs)

    def _fill(self, kv_cache: torch.Tensor, with_rows: bool) -> None:
        key_cache, value_cache = self.halves(kv_cache)
        for s, length in enumerate(self.lengths):
            known = length if with_rows else length - self.rows[s]
            slots = self._slots(s, length)[:known]
            keys, values = self.keys[s][:known], self.values[s][:known]
            vllm_ops.cpu_attn_reshape_and_cache(keys, values, key_cache, value_cache, slots, "vec")

    def _slots(self, s: int, rows: int) -> torch.Tensor:
        positions = torch.arange(self.lengths[s] - rows, self.lengths[s])
        return self.block_table[s, positions // self.block_size].long() * self.block_size + positions % self.block_size


SHAPES = {
    "decode": Batch([1, 31, 32, 33, 64, 130], [1] * 6),
    "prefill": Batch([1, 31, 33, 100], [1, 31, 33, 100]),
    "chunks and decodes": Batch([70, 90, 5, 128], [7, 1, 5, 65]),
    "one head a head": Batch([40, 77], [1, 9], heads=4, kv_heads=4),
    "seven heads a head": Batch([40, 77], [1, 9], heads=7, kv_heads=1),
    "sixteen heads a head": Batch([40, 77], [1, 3], heads=32, kv_heads=2),
    "head of 32": Batch([40, 77], [1, 9], head_dim=32),
    "head of 96": Batch([40, 77], [1, 9], head_dim=96),
    "head of 128, blocks of 128": Batch([40, 300], [1, 9], head_dim=128, block_size=128),
}


@pytest.mark.parametrize("batch", SHAPES.values(), ids=SHAPES.keys())
def test_float32_agrees_with_float64(batch: Batch) -> None:
    torch.testing.assert_close(batch.attend().double(), batch.exact(), atol=2e-6, rtol=0)


def test_bfloat16_is_rounded_once() -> None:
    batch = Batch([1, 33, 130, 300], [1, 33, 1, 70], dtype=torch.bfloat16, block_size=128)
    exact = batch.exact()
    # Half a unit in the last of 8 bits, and a little for the sums.
    assert ((batch.attend().double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_cache_is_written_as_vllm_writes_it(dtype: torch.dtype) -> None:
    batch = Batch([1, 33, 130, 300], [1, 33, 1, 70], dtype=dtype)
    expected = batch.kv_cache.clone()
    vllm_ops.cpu_attn_reshape_and_cache(batch.key, batch.value, *batch.halves(expected), batch.slot_mapping, "vec")
    batch.attend()
    assert torch.equal(batch.kv_cache.nan_to_num(7e7), expected.nan_to_num(7e7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_decoded_row_is_the_row_of_a_prefill_bit_for_bit(dtype: torch.dtype) -> None:
    whole = Batch([100], [100], dtype=dtype)
    outputs = whole.attend()
    for length, rows in ((1, 1), (32, 1), (33, 1), (77, 1), (100, 1), (90, 13)):
        part = Batch([100], [100], dtype=dtype)
        new = slice(length - rows, length)
        part.query, part.key, part.value = part.query[new], part.key[new], part.value[new]
        part.seq_lens, part.query_start_loc = torch.tensor([length]).int(), torch.tensor([0, rows]).int()
        part._fill(part.kv_cache, with_rows=True)
        assert torch.equal(part.attend(), outputs[new]), (length, rows)


def test_a_row_depends_on_neither_its_batch_nor_the_threads() -> None:
    batch = Batch([70, 90, 5, 128, 33], [7, 1, 5, 65, 1])
    outputs = batch.attend()
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(Batch([70, 90, 5, 128, 33], [7, 1, 5, 65, 1]).attend(), outputs)
    finally:
        torch.set_num_threads(threads)
    for s, (start, end) in enumerate(batch.spans()):
        alone = Batch([70, 90, 5, 128, 33], [7, 1, 5, 65, 1])
        alone.query, alone.key, alone.value = (x[start:end] for x in (alone.query, alone.key, alone.value))
        alone.seq_lens, alone.block_table = alone.seq_lens[s : s + 1], alone.block_table[s : s + 1]
        alone.query_start_loc = torch.tensor([0, end - start]).int()
        assert torch.equal(alone.attend(), outputs[start:end]), s


@pytest.fixture(scope="module")
def config(tiny_model_path: Path) -> Any:
    return base_config(tiny_model_path)


class Layer(torch.nn.Module):
    """What a layer shows of itself to the kernel."""

    isa = "vec"
    kv_cache_torch_dtype = torch.float32
    _k_scale_float = _v_scale_float = 1.0

    def __init__(self, config: Any, **settings: Any) -> None:
        super().__init__()
        defaults = dict(num_heads=6, head_size=64, scale=0.125, num_kv_heads=2, kv_cache_dtype="auto")
        defaults |= dict(alibi_slopes=None, sliding_window=None)
        with set_current_vllm_config(config):
            self.impl = CPUAttentionBackendImpl(**defaults | settings)


def test_what_the_kernel_does_not_compute_is_left_to_vllm(config: Any) -> None:
    assert is_plain_attention(Layer(config))
    assert not is_plain_attention(Layer(config, sliding_window=128))
    assert not is_plain_attention(Layer(config, alibi_slopes=[0.5] * 6))
    assert not is_plain_attention(Layer(config, logits_soft_cap=30.0))
    assert not is_plain_attention(Layer(config, sinks=torch.zeros(6)))
    assert not is_plain_attention(Layer(config, kv_sharing_target_layer_name="another"))
    assert not is_plain_attention(Layer(config, kv_cache_dtype="fp8"))
    assert not is_plain_attention(Layer(config, head_size=80))
    assert not is_plain_attention(Layer(config, attn_type=AttentionType.ENCODER_ONLY))
    for attribute, value in (("isa", "amx"), ("isa", "vec16"), ("kv_cache_torch_dtype", torch.float16)):
        layer = Layer(config)
        setattr(layer, attribute, value)
        assert not is_plain_attention(layer), attribute


@pytest.mark.parametrize("causal", [True, False])
def test_a_replaced_layer_computes_what_vllms_does(config: Any, causal: bool) -> None:
    batch = Batch([70, 90, 5, 128], [7, 1, 5, 65])
    batch.kv_cache.nan_to_num_(0.0)
    batch.causal, batch.dynamic_causal, batch.num_actual_tokens = causal, None, len(batch.query)
    batch.scheduler_metadata = vllm_ops.cpu_attn_get_scheduler_metadata(
        num_reqs=4,
        num_heads=6,
        num_kv_heads=2,
        head_dim=64,
        seq_lens=batch.seq_lens,
        dtype=batch.dtype,
        query_start_loc=batch.query_start_loc,
        causal=causal,
        sliding_window_size=-1,
        isa="vec",
        enable_kv_split=False,
    )
    outputs = []
    for replaced in (False, True):
        layer, kv_cache, output = Layer(config), batch.kv_cache.clone(), torch.empty_like(batch.query.contiguous())
        if replaced:
            PagedAttention(layer.impl, load_library("attention"))
        layer.impl.do_kv_cache_update(layer, batch.key, batch.value, kv_cache, batch.slot_mapping)
        layer.impl.forward(layer, batch.query, batch.key, batch.value, kv_cache, batch, output)
        outputs.append(output)
    torch.testing.assert_close(outputs[1], outputs[0], atol=2e-6, rtol=0)
    assert causal == torch.allclose(outputs[0].double(), batch.exact(), atol=2e-6), "the two masks differ"
