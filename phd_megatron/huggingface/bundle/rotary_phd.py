"""RoPE (arXiv 2104.09864), also stretched for a longer context: Llama 3.1's scaling and YaRN are transformers' own."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration_phd import PHDConfig
from .rows_phd import LayerRows


def rotary_frequencies(config: PHDConfig, device: torch.device) -> tuple[Tensor, float]:
    """Frequencies ``[rotary_dim / 2]``, float32, and by what cosines and sines are multiplied.

    Made on the fly: a buffer would be lost when transformers builds the model on the meta device.
    """
    kind = config.rope_parameters.get("rope_type", "default")
    if kind == "default":
        exponent = torch.arange(0, config.rotary_dim, 2, device=device, dtype=torch.float32) / config.rotary_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponent, 1.0
    # transformers makes some numbers on the host and copies them, which no CUDA graph can; torch.compile cannot trace
    # the context, and makes its own graphs.
    with nullcontext() if torch.compiler.is_compiling() else device:
        return ROPE_INIT_FUNCTIONS[kind](config, device)


def rotary_table(config: PHDConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[b, rows, 1, rotary_dim]`` at positions ``[b, rows]``, the first half of sines negated."""
    frequency, factor = rotary_frequencies(config, positions.device)
    angle = positions[..., None, None] * frequency
    cos, sin = angle.cos() * factor, angle.sin() * factor
    return torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)


def rotary_tables(config: PHDConfig, rows: LayerRows, like: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """Tables of a layer's queries and of its keys, made once for all layers with the same rows."""

    def tables() -> tuple[tuple[Tensor, Tensor], ...]:
        cos, sin = rotary_table(config, rows.rotary_positions(config.phd_copy_positions).to(like.device), like.dtype)
        return (rows.select(cos), rows.select(sin)), (cos, sin)

    return rows.step.once(("rotary", rows.start, rows.end, rows.last, like.device, like.dtype), tables)


def apply_rotary(states: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first ``rotary_dim`` dimensions of ``[b, rows, heads, d]``, first half against second half."""
    cos, sin = table
    turned, rest = states[..., : cos.size(-1)], states[..., cos.size(-1) :]
    turned = torch.addcmul(turned * cos, turned.roll(cos.size(-1) // 2, dims=-1), sin)
    return torch.cat([turned, rest], dim=-1) if rest.size(-1) else turned
