"""Where a transformer block normalises: the table of norm schemes (HybridNorm, arXiv 2503.04598).

A scheme is data. :class:`BlockNorm` says for one block whether the input of each sublayer is normed, which residual
is added back, whether a norm follows, and which of q/k/v/c are normed per head. :func:`norm_plan` gives each layer its
record. Nothing else branches on a scheme's name. Standard library only: the file also ships inside exported models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class SublayerNorm:
    """Norms around one sublayer ``f`` with input ``x``.

    Attributes:
        input_norm: ``f`` reads ``Norm(x)`` instead of ``x``.
        residual: what is added to ``f``'s output, ``x`` (``raw``) or ``Norm(x)`` (``normed``).
        output_norm: ``sum`` norms the sum, ``None`` leaves it alone.
    """

    input_norm: bool = True
    residual: Literal["raw", "normed"] = "raw"
    output_norm: Literal["sum"] | None = None

    def __post_init__(self) -> None:
        if self.residual == "normed" and not self.input_norm:
            raise ValueError("residual='normed' needs input_norm=True: there is no normed input to add")


PRE = SublayerNorm()
BARE = SublayerNorm(input_norm=False)
POST = SublayerNorm(input_norm=False, output_norm="sum")
NORMED_RESIDUAL = SublayerNorm(residual="normed")


@dataclass(frozen=True)
class BlockNorm:
    """Norms of one block: around attention, around the FFN, and inside attention.

    ``heads`` is a subset of ``"qkvc"``: per-head norms of size ``head_dim`` on query, key, value (before RoPE) and on
    the attention context before the output projection.
    """

    attention: SublayerNorm = PRE
    mlp: SublayerNorm = PRE
    heads: str = ""


@dataclass(frozen=True)
class NormScheme:
    """One row of the table. ``plan(index, num_layers)`` gives the block with 0-based index its record."""

    plan: Callable[[int, int], BlockNorm]
    default_init: Literal["normal", "depth_scaled", "megatron"]
    formula: str


def _same(block: BlockNorm) -> Callable[[int, int], BlockNorm]:
    return lambda index, num_layers: block


_HYBRID = BlockNorm(attention=BARE, mlp=NORMED_RESIDUAL, heads="qkv")
_HYBRID_STAR_FIRST = replace(_HYBRID, attention=PRE, mlp=PRE)

NORM_SCHEMES: dict[str, NormScheme] = {
    "pre": NormScheme(_same(BlockNorm()), "normal", "Y = MHA(Norm(X)) + X; X' = FFN(Norm(Y)) + Y"),
    "pre_qk": NormScheme(_same(BlockNorm(heads="qk")), "normal", "Y = MHA_QK(Norm(X)) + X; X' = FFN(Norm(Y)) + Y"),
    "post": NormScheme(
        _same(BlockNorm(attention=POST, mlp=POST)), "normal", "Y = Norm(MHA(X) + X); X' = Norm(FFN(Y) + Y)"
    ),
    "hybrid": NormScheme(_same(_HYBRID), "megatron", "Y = MHA_QKV(X) + X; X' = FFN(Norm(Y)) + Norm(Y)"),
    "hybrid_star": NormScheme(
        lambda index, num_layers: _HYBRID_STAR_FIRST if index == 0 else _HYBRID,
        "megatron",
        "first block: Y = MHA_QKV(Norm(X)) + X; X' = FFN(Norm(Y)) + Y; the others as hybrid",
    ),
}


def norm_scheme(name: str) -> NormScheme:
    """Look a scheme up.

    Raises:
        ValueError: for an unknown name, with the known ones.
    """
    if name not in NORM_SCHEMES:
        raise ValueError(f"norm_scheme={name!r} is not known; choose one of {', '.join(NORM_SCHEMES)}")
    return NORM_SCHEMES[name]


def norm_plan(name: str, num_layers: int) -> tuple[BlockNorm, ...]:
    """The record of every layer, in order of the global layer number."""
    scheme = norm_scheme(name)
    return tuple(scheme.plan(index, num_layers) for index in range(num_layers))
