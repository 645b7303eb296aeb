"""Copies into transposed buffers are torch's own, bit for bit, whatever the sizes, the dtypes and the numbers."""

import itertools

import pytest
import torch

from rollout.backend.native import load_library
from rollout.backend.transpose import copy_into, transposed_buffer

DTYPES = (torch.float32, torch.bfloat16)
SPECIAL = torch.tensor([0x7FC00000, 0x7F800001, -0x400000, 0x7F800000, 1, 0x7F7FFFFF, 0x3F808000, 0x3F818000, -1])


def numbers(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Any bits at all: normal and subnormal numbers, infinities and what is no number."""
    generator = torch.Generator().manual_seed(rows * columns)
    bits = torch.randint(-(2**31), 2**31, (rows, columns), generator=generator)
    bits.view(-1)[: len(SPECIAL)] = SPECIAL[: bits.numel()]
    found = bits.to(torch.int32).view(torch.float32)
    return found if dtype == torch.float32 else (bits >> 16).to(torch.int16).view(torch.bfloat16)


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """What is no number keeps that, and not its bits: torch's own copies differ in these."""
    found = tensor.contiguous()
    return torch.where(found.isnan(), torch.nan, found).view(
        torch.int32 if found.dtype == torch.float32 else torch.int16
    )


@pytest.mark.skipif(load_library("transpose") is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("given,wanted", list(itertools.product(DTYPES, DTYPES)))
@pytest.mark.parametrize("rows,columns", [(16, 16), (17, 33), (3, 5), (2, 1), (1, 7), (560, 144), (530, 275)])
def test_it_is_torchs_copy(given: torch.dtype, wanted: torch.dtype, rows: int, columns: int) -> None:
    source = numbers(rows, columns, given)
    target = transposed_buffer(source.shape, wanted)
    assert target.t().is_contiguous()
    copy_into(target, source)
    assert torch.equal(bits_of(target), bits_of(torch.zeros(source.shape, dtype=wanted).copy_(source)))


def test_a_part_goes_where_it_belongs_and_nowhere_else() -> None:
    source = numbers(60, 50, torch.float32).nan_to_num()
    target = transposed_buffer(torch.Size([80, 70]), torch.float32)
    copy_into(target[3:43, 5:38], source[10:50, 7:40])
    expected = torch.zeros(80, 70)
    expected[3:43, 5:38] = source[10:50, 7:40]
    assert torch.equal(target, expected)


@pytest.mark.parametrize("given", [torch.float16, torch.float64, torch.int32])
def test_what_the_kernel_does_not_know_is_left_to_torch(given: torch.dtype) -> None:
    source = torch.arange(600).reshape(20, 30).to(given)
    for target in (transposed_buffer(source.shape, torch.float32), torch.zeros(20, 30)):
        copy_into(target, source)
        assert torch.equal(target, source.float())
    turned = transposed_buffer(torch.Size([30, 20]), torch.float32)
    copy_into(turned, source.t())
    assert torch.equal(turned, source.t().float())
