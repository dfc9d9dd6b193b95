"""What a vendor's attention kernel is given: views where it can read them, and copies where it could not."""

from __future__ import annotations

import pytest
import torch

from phd_megatron.kernels.phd_attention.folding import dense, unit_stride

MEMORY = torch.arange(64, dtype=torch.float32)
assert MEMORY.data_ptr() % 16 == 0


@pytest.mark.parametrize(
    ("x", "is_read_as_it_is"),
    [
        (MEMORY.view(4, 16), True),
        (MEMORY[4:60].view(7, 8), True),
        (MEMORY[1:33].view(4, 8), False),  # begins at 4 bytes
        (MEMORY[:60].view(6, 10), False),  # rows begin at 40 bytes
        (MEMORY[:10].view(1, 10), True),  # one row has no second one
        (MEMORY.view(4, 16).t(), False),
        (MEMORY.view(4, 16)[:, ::2], False),
    ],
    ids=["whole", "offset-of-16", "offset-of-4", "rows-of-40", "one-row", "transposed", "every-second"],
)
def test_dense_copies_what_is_not_aligned_and_nothing_else(x: torch.Tensor, is_read_as_it_is: bool) -> None:
    found = dense(x)
    assert torch.equal(found, x) and (found.data_ptr() == x.data_ptr()) == is_read_as_it_is
    assert is_read_as_it_is or (found.is_contiguous() and found.data_ptr() % 16 == 0)


def test_unit_stride_copies_only_other_strides() -> None:
    rows = MEMORY[1:33].view(4, 8)
    assert unit_stride(rows).data_ptr() == rows.data_ptr()
    turned = unit_stride(rows.t())
    assert turned.stride(-1) == 1 and torch.equal(turned, rows.t())
