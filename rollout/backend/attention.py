"""Attention on the CPU, in one call a layer: write this step's keys and values, then attend.

vLLM's CPU kernel waits for memory: at 512 sequences of 170 tokens a (sequence, head) takes it 7.5 us, of which 1.2 are
arithmetic. Each reads some 40 KB that nothing has touched since the last step. kernels/attention.cpp fetches the next
one's cache lines while it computes this one's, and takes 2.6 us.

It covers plain causal attention over vLLM's "vec" cache layout (x86 without AMX) in bfloat16 and float32. Layers with a
sliding window, ALiBi, soft caps, sinks, another layer's cache or an 8-bit cache keep vLLM's kernel.
"""

import ctypes
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadata

from rollout.backend.native import load_library

POINTERS = ("query", "key", "value", "output", "cache", "starts", "lengths", "tables")
STRIDES = ("query_stride", "key_stride", "value_stride", "table_stride")
SIZES = ("sequences", "heads", "kv_heads", "head_dim", "block_size")


class Step(ctypes.Structure):
    """kernels/attention.cpp's Step, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in STRIDES),
        *((name, ctypes.c_int32) for name in SIZES),
        ("scale", ctypes.c_float),
    ]


class PagedAttention:
    """Takes the place of one layer's `forward` and `do_kv_cache_update`; see `replace_attention`.

    Args:
        impl: the layer's CPUAttentionBackendImpl.
        library: of attention.cpp.
    """

    def __init__(self, impl: CPUAttentionBackendImpl, library: ctypes.CDLL) -> None:
        self._library = library
        self._forward, self._update = impl.forward, impl.do_kv_cache_update
        self._step = Step(heads=impl.num_heads, kv_heads=impl.num_kv_heads, head_dim=impl.head_size, scale=impl.scale)
        impl.forward, impl.do_kv_cache_update = self.forward, self.do_kv_cache_update

    def do_kv_cache_update(self, *_: Any) -> None:
        """Left to `forward`, which has the cache lines at hand."""

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Stands in for CPUAttentionBackendImpl.forward; see there for the shapes."""
        if attn_metadata is None:  # warm-up without a cache
            return output
        if not attn_metadata.causal or attn_metadata.dynamic_causal is not None or output_scale is not None:
            tokens = attn_metadata.num_actual_tokens
            self._update(layer, key[:tokens], value[:tokens], kv_cache, attn_metadata.slot_mapping)
            return self._forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        attend(self._library, self._step, query, key, value, kv_cache, attn_metadata, output)
        return output


def attend(
    library: ctypes.CDLL,
    step: Step,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: Any,
    output: torch.Tensor,
) -> None:
    """softmax(scale * Q K^T) V, causal, of every sequence in the batch; writes K and V to the cache on the way.

    Args:
        library: of attention.cpp.
        step: with heads, kv_heads, head_dim and scale; the rest is filled in.
        query: (tokens, heads, head_dim) bfloat16 or float32; tokens may be further apart than heads * head_dim.
        key: (tokens, kv_heads, head_dim), likewise.
        value: as `key`.
        kv_cache: (blocks, kv_heads, block_size, 2 * head_dim), contiguous; a multiple of 32 positions a block.
        batch: has query_start_loc (sequences + 1,), seq_lens (sequences,), block_table (sequences, blocks), all int32.
        output: (tokens, heads, head_dim), or of that size, contiguous; written.
    """
    assert kv_cache.is_contiguous() and output.is_contiguous(), (kv_cache.stride(), output.stride())
    assert query.dtype == key.dtype == value.dtype == kv_cache.dtype == output.dtype
    query, key, value = (_rows(tensor) for tensor in (query, key, value))
    lengths, tables = batch.seq_lens, batch.block_table
    assert lengths.dtype == tables.dtype == batch.query_start_loc.dtype == torch.int32 and tables.stride(1) == 1
    step.query, step.query_stride = query.data_ptr(), query.stride(0)
    step.key, step.key_stride = key.data_ptr(), key.stride(0)
    step.value, step.value_stride = value.data_ptr(), value.stride(0)
    step.output, step.cache = output.data_ptr(), kv_cache.data_ptr()
    step.starts, step.lengths = batch.query_start_loc.data_ptr(), lengths.data_ptr()
    step.tables, step.table_stride = tables.data_ptr(), tables.stride(0)
    step.sequences, step.block_size = len(lengths), kv_cache.shape[2]
    kernel = library.attend_bfloat16 if query.dtype == torch.bfloat16 else library.attend_float32
    kernel(ctypes.byref(step))  # without the interpreter's lock: ctypes gives it up


def replace_attention(model: torch.nn.Module) -> int:
    """Give every plain attention layer of a loaded model our kernel.

    Returns:
        The number of layers that have it now: 0 where nothing could be compiled.
    """
    layers = [module for module in model.modules() if isinstance(module, Attention) and is_plain_attention(module)]
    library = load_library("attention") if layers else None
    if library is None:
        return 0
    for layer in layers:
        PagedAttention(layer.impl, library)
    return len(layers)


def is_plain_attention(layer: Attention) -> bool:
    """True if the kernel computes what the layer asks for. Ask when the KV cache is in place: it decides the layout."""
    impl = layer.impl
    return (
        type(impl) is CPUAttentionBackendImpl
        and getattr(layer, "isa", None) == "vec"
        and impl.attn_type == AttentionType.DECODER
        and impl.alibi_slopes is None
        and impl.sliding_window == -1
        and not impl.logits_soft_cap
        and impl.sinks is None
        and impl.kv_sharing_target_layer_name is None
        and not impl.is_fp8_kv_cache
        and impl.head_size % 32 == 0
        and impl.head_size <= 512
        and layer.kv_cache_torch_dtype in (torch.bfloat16, torch.float32)
    )


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """(tokens, heads, head_dim) with each token's heads side by side."""
    dense = tensor.stride(2) == 1 and tensor.stride(1) == tensor.shape[2]
    return tensor if dense else tensor.contiguous()
