"""A learned vector for each hidden copy of a token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from phd_megatron.norm.modules import mark
from phd_megatron.phd.copies import repeat_tokens

if TYPE_CHECKING:
    from phd_megatron.model.transformer_config import PHDTransformerConfig

COPY_EMBEDDING = "copy_embedding.weight"
"""Its name in a checkpoint."""


class CopyEmbedding(nn.Module):
    """Makes the copies of embedded tokens and adds to each of copies 2 to K its own vector, zero at the start.

    An extension of ours: in the paper (arXiv 2504.14992) copies differ by the mask alone. ``weight`` is ``[K-1, h]``,
    whole on every rank of the first pipeline stage. It is never decayed: its scale is that of the token embeddings it
    is added to, not of a matrix.
    """

    def __init__(self, config: PHDTransformerConfig) -> None:
        super().__init__()
        self.repeat = config.kv_policy.repeat
        self.weight = nn.Parameter(torch.zeros(self.repeat - 1, config.hidden_size, dtype=config.params_dtype))
        # Under sequence parallelism each rank sees its share of the tokens: Megatron-Core then sums the gradients.
        mark([self.weight], sequence_parallel=config.sequence_parallel, never_decayed=True)

    def forward(self, embedded: Tensor) -> Tensor:
        """``[s, b, h]`` to ``[K*s, b, h]``, originals first and unchanged."""
        return repeat_tokens(embedded, self.repeat, self.weight)
