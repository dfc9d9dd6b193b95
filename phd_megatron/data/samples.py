"""What a data set of tokens gives to whoever trains or evaluates."""

from __future__ import annotations

from typing import Protocol, TypeAlias

from torch import Tensor

Sample: TypeAlias = dict[str, Tensor]
"""``tokens``, ``labels``, ``position_ids`` (int64) and ``loss_mask`` (float32), each ``[seq_length]``.

Where documents are kept apart (``reset_attention_mask``) also ``document_starts`` (int64): for each token where its
document begins (:mod:`phd_megatron.phd.documents`).
"""


class Samples(Protocol):
    """A data set of known length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...
