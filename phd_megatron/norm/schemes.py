"""Where a transformer block normalises: the table of norm schemes (HybridNorm, arXiv 2503.04598, and what it compares).

A scheme is data. :class:`BlockNorm` says for one block whether the input of each sublayer is normed, which residual
is added back, whether a norm follows, and which of q/k/v/c are normed. :func:`norm_plan` gives each layer its record.
Nothing else branches on a scheme's name. Standard library only: the file also ships inside exported models.
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
        residual_scale: what the residual is multiplied by before that.
        output_norm: ``branch`` norms ``f``'s output before the residual is added, ``sum`` norms the sum, ``None``
            neither.
        output_norm_init: initial weight of that norm.
    """

    input_norm: bool = True
    residual: Literal["raw", "normed"] = "raw"
    residual_scale: float = 1.0
    output_norm: Literal["branch", "sum"] | None = None
    output_norm_init: float = 1.0

    def __post_init__(self) -> None:
        if self.residual == "normed" and not self.input_norm:
            raise ValueError("residual='normed' needs input_norm=True: there is no normed input to add")


@dataclass(frozen=True)
class BlockNorm:
    """Norms of one block: around attention, around the FFN, and inside attention.

    Attributes:
        heads: a subset of ``"qkvc"``: norms on query, key, value (before RoPE) and on the attention context before the
            output projection. Each has one weight of size ``head_dim`` and works on one head at a time.
        qk_norm_width: ``full`` norms the whole query and the whole key of a token instead, with weights of
            ``heads * head_dim`` and ``kv_heads * head_dim``.
    """

    attention: SublayerNorm
    mlp: SublayerNorm
    heads: str = ""
    qk_norm_width: Literal["head", "full"] = "head"


Plan = Callable[[int, int], BlockNorm]


@dataclass(frozen=True)
class NormScheme:
    """One row of the table.

    Attributes:
        plan: ``plan(index, num_layers)`` gives the block with 0-based index its record.
        formula: for people; ``X`` a block's input, ``Y`` what attention leaves, ``X'`` the block's output.
        source: where the scheme comes from.
        figure: what the paper reports of it, where it does.
        default_init: the ``init`` that ``auto`` takes.
        init_gain: of the number of layers: the standard deviation of value, attention-output and all FFN weights is
            multiplied by it. A scheme with a gain has ``init: deepnorm`` and no other.
        embed_norm: a norm of the model width follows the embedding.
    """

    plan: Plan
    formula: str
    source: str
    figure: str = ""
    default_init: Literal["normal", "depth_scaled", "megatron", "deepnorm"] = "normal"
    init_gain: Callable[[int], float] | None = None
    embed_norm: bool = False


PRE = SublayerNorm()
BARE = SublayerNorm(input_norm=False)
POST = SublayerNorm(input_norm=False, output_norm="sum")
NORMED_RESIDUAL = SublayerNorm(residual="normed")
AFTER = SublayerNorm(input_norm=False, output_norm="branch")
AROUND = SublayerNorm(output_norm="branch")

_HYBRID = BlockNorm(BARE, NORMED_RESIDUAL, "qkv")
_HYBRID_STAR_FIRST = BlockNorm(PRE, PRE, "qkv")

_PAPER = "HybridNorm (arXiv 2503.04598)"
_BEFORE = {"": "X", "pre_": "Norm(X)"}
_AFTER = {"post": ("Norm(Y)", NORMED_RESIDUAL), "pre": ("Y", PRE)}
HEAD_SETS = ("qkv", "qkvc", "qkc", "qk", "kv", "kc")


def _same(block: BlockNorm) -> Plan:
    return lambda index, num_layers: block


def _first(first: BlockNorm, others: BlockNorm) -> Plan:
    return lambda index, num_layers: first if index == 0 else others


def _mix_ln(index: int, num_layers: int) -> BlockNorm:
    return BlockNorm(POST, POST) if index < num_layers // 4 else BlockNorm(PRE, PRE)


def _deepnorm(index: int, num_layers: int) -> BlockNorm:
    sublayer = replace(POST, residual_scale=(2 * num_layers) ** 0.25)
    return BlockNorm(sublayer, sublayer)


def _hybrid_star_7b(index: int, num_layers: int) -> BlockNorm:
    block = _HYBRID_STAR_FIRST if index == 0 else _HYBRID
    attention = replace(block.attention, output_norm="branch", output_norm_init=(2 * num_layers) ** -0.5)
    return replace(block, attention=attention)


def _products() -> dict[str, NormScheme]:
    """``[pre_]{set}_{pre|post}``: norm before attention or not x norms inside x residual of the FFN."""
    rows = {}
    for before, x in _BEFORE.items():
        for heads in HEAD_SETS:
            for after, (residual, mlp) in _AFTER.items():
                block = BlockNorm(PRE if before else BARE, mlp, heads)
                rows[f"{before}{heads}_{after}"] = NormScheme(
                    _same(block),
                    f"Y = MHA_{heads.upper()}({x}) + X; X' = FFN(Norm(Y)) + {residual}",
                    _PAPER,
                    default_init="megatron" if after == "post" else "normal",
                )
    return rows


#: both names are accepted; the second is the row's
ALIASES = {"qkv_post": "hybrid", "pre_qk_pre": "pre_qk"}
_PRODUCTS = _products()
_LOSS = "550M, 400B tokens: loss "

NORM_SCHEMES: dict[str, NormScheme] = {
    "pre": NormScheme(
        _same(BlockNorm(PRE, PRE)),
        "Y = MHA(Norm(X)) + X; X' = FFN(Norm(Y)) + Y",
        "Pre-Norm (arXiv 2002.04745)",
        _LOSS + "2.751",
    ),
    "post": NormScheme(
        _same(BlockNorm(POST, POST)),
        "Y = Norm(MHA(X) + X); X' = Norm(FFN(Y) + Y)",
        "Post-Norm (arXiv 1706.03762)",
        _LOSS + "2.760; diverges at 29 layers",
    ),
    "hybrid": replace(_PRODUCTS["qkv_post"], figure=_LOSS + "2.737"),
    "hybrid_star": NormScheme(
        _first(_HYBRID_STAR_FIRST, _HYBRID),
        "first block: Y = MHA_QKV(Norm(X)) + X; X' = FFN(Norm(Y)) + Y; the others as hybrid",
        _PAPER,
        _LOSS + "2.731",
        default_init="megatron",
    ),
    "hybrid_star_7b": NormScheme(
        _hybrid_star_7b,
        "as hybrid_star, with Norm(MHA_QKV(...)) for MHA_QKV(...); the weight of that norm starts at 1/sqrt(2 L)",
        _PAPER,
        "7B, 150B tokens: loss 2.430 (pre 2.469)",
        default_init="megatron",
    ),
    "pre_qk": _PRODUCTS["pre_qk_pre"],
    **{name: row for name, row in _PRODUCTS.items() if name not in ALIASES},
    "pre_post": NormScheme(
        _same(BlockNorm(PRE, NORMED_RESIDUAL)),
        "Y = MHA(Norm(X)) + X; X' = FFN(Norm(Y)) + Norm(Y)",
        _PAPER,
        default_init="megatron",
    ),
    "post_pre": NormScheme(
        _same(BlockNorm(NORMED_RESIDUAL, PRE)),
        "Y = MHA(Norm(X)) + Norm(X); X' = FFN(Norm(Y)) + Y",
        _PAPER,
    ),
    "first_qkv_pre": NormScheme(
        _first(BlockNorm(BARE, PRE, "qkv"), _HYBRID),
        "first block: Y = MHA_QKV(X) + X; X' = FFN(Norm(Y)) + Y; the others as hybrid",
        _PAPER,
        default_init="megatron",
    ),
    "embed_norm": NormScheme(
        _same(_HYBRID),
        "first block: X = Norm(embedding); all blocks as hybrid",
        _PAPER,
        default_init="megatron",
        embed_norm=True,
    ),
    "mix_ln": NormScheme(
        _mix_ln,
        "first floor(L/4) blocks as post, the others as pre",
        "Mix-LN (arXiv 2412.13795)",
        _LOSS + "2.760",
    ),
    "sandwich": NormScheme(
        _same(BlockNorm(AROUND, AROUND)),
        "Y = Norm(MHA(Norm(X))) + X; X' = Norm(FFN(Norm(Y))) + Y",
        "Sandwich-LN (arXiv 2105.13290)",
        _LOSS + "2.751",
    ),
    "outputnorm": NormScheme(
        _same(BlockNorm(AFTER, AFTER, "qk")),
        "Y = Norm(MHA_QK(X)) + X; X' = Norm(FFN(Y)) + Y",
        _PAPER,
        _LOSS + "2.750",
    ),
    "olmo2": NormScheme(
        _same(BlockNorm(AFTER, AFTER, "qk", "full")),
        "as outputnorm, with the QK norms over all heads at once",
        "OLMo 2 (arXiv 2501.00656)",
    ),
    "olmoe": NormScheme(
        _same(BlockNorm(PRE, PRE, "qk", "full")),
        "as pre_qk, with the QK norms over all heads at once",
        "OLMoE (arXiv 2409.02060)",
    ),
    "deepnorm": NormScheme(
        _deepnorm,
        "Y = Norm(MHA(X) + a X); X' = Norm(FFN(Y) + a Y), a = (2 L)^(1/4); "
        "value, output and FFN weights start (8 L)^(-1/4) times as large",
        "DeepNorm (arXiv 2203.00555)",
        _LOSS + "2.746",
        default_init="deepnorm",
        init_gain=lambda num_layers: (8 * num_layers) ** -0.25,
    ),
}
NORM_SCHEMES["qk_post"] = replace(NORM_SCHEMES["qk_post"], figure="550M: diverges")


def norm_scheme(name: str) -> NormScheme:
    """Look a scheme up.

    Raises:
        ValueError: for an unknown name, with the known ones.
    """
    row = ALIASES.get(name, name)
    if row not in NORM_SCHEMES:
        raise ValueError(f"norm_scheme={name!r} is not known; choose one of {', '.join([*NORM_SCHEMES, *ALIASES])}")
    return NORM_SCHEMES[row]


def norm_plan(name: str, num_layers: int) -> tuple[BlockNorm, ...]:
    """The record of every layer, in order of the global layer number."""
    scheme = norm_scheme(name)
    return tuple(scheme.plan(index, num_layers) for index in range(num_layers))
