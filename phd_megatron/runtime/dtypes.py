"""The type of a run's parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phd_megatron.config.schema import RunConfig

if TYPE_CHECKING:
    import torch


def params_dtype(run: RunConfig) -> torch.dtype:
    """Type of the parameters the forward pass uses."""
    import torch

    return torch.bfloat16 if run.training.bf16 else torch.float16 if run.training.fp16 else torch.float32
