"""Named configurations: the models of the two papers with their training recipe, and tiny ones for a CPU.

A preset is a row of fields. Presets combine: ``--preset dense-550m,phd-swa-3-16`` takes the first and then the second,
and a later one wins. Everything else (a saved configuration, a YAML file, flags) wins over presets. ``Preset.notes``
says what a paper leaves open or says twice, and what was taken. The files in ``examples/presets`` and
``docs/presets.md`` are written from this table by ``tools/write_presets.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from phd_megatron.config.catalog import nearest
from phd_megatron.config.plain import Plain, Values
from phd_megatron.errors import UserError, shown

HYBRID_NORM = "HybridNorm, arXiv 2503.04598"
PHD = "PHD-Transformer, arXiv 2504.14992"
OURS = "ours"


@dataclass(frozen=True)
class Preset:
    """One row.

    Attributes:
        title: what it is, in a line.
        paper: where the sizes are from; :data:`OURS` for none.
        reproduces: the table or figure, with its numbers.
        values: field name -> value, in the order in which examples show them.
        tokens: training budget in original tokens; 0 for a preset that is only a part of a configuration.
        parameters: what the paper calls the size: (total, active) in parameters; None where there is none to compare.
        notes: choices where the paper is open or contradicts itself.
    """

    title: str
    paper: str
    reproduces: str
    values: Values
    tokens: float = 0
    parameters: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether it describes a whole model and run, and not only K, W and C."""
        return "num_layers" in self.values


_SEQ_LENGTH, _BATCH = 4096, 1024
_BATCH_TOKENS = _SEQ_LENGTH * _BATCH

_RECIPE: dict[str, Plain] = {
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "split": "999,1,0",
    "micro_batch_size": 1,
    "global_batch_size": _BATCH,
    "bf16": True,
    "eval_interval": 1000,
    "eval_iters": 8,
    "lr": 3e-4,
    "min_lr": 3e-5,
    "lr_decay_style": "cosine",
    "lr_warmup_tokens": 2000 * _BATCH_TOKENS,
    "weight_decay": 0.1,
    "decay_norms": True,
    "decay_embeddings": False,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_eps": 1e-8,
    "clip_grad": 1.0,
    "keep_last": 3,
}

_CODE = "as in the authors' configuration (github.com/BryceZhuo/HybridNorm)"
_DECAY = f"norms are decayed and the input embedding is not, {_CODE}"
_HEAD = "head_init_method_std is 1/sqrt(hidden_size), as the authors' full_megatron draws a head that is not tied"
_BUDGET = "the training budget is our choice"
_WIDTH = "ffn_hidden_size is half of what the paper prints: there the gate and up projections count together"
_SCHEME = "norm_scheme hybrid_star is the paper's best; its baseline is --norm-scheme pre, its other model hybrid"
_DENSE_NOTES = (_SCHEME, _DECAY)
_PHD_RECIPE = (
    "sequence length, batch, learning rate, warm-up, what is decayed, vocabulary and RoPE base follow HybridNorm's "
    "dense recipe, whose code base is the same (OLMo 2): the PHD paper prints none of them",
    "norm_scheme pre is our choice; hybrid_star adds HybridNorm*",
)


def _sizes(layers: int, hidden: int, ffn: int, heads: int, groups: int) -> dict[str, Plain]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": hidden // heads,
    }


def _model(sizes: Values, tokens: float, **changes: Plain) -> dict[str, Plain]:
    """Sizes, then what all models of the papers share, then what this one has of its own."""
    shared: dict[str, Plain] = {
        "seq_length": _SEQ_LENGTH,
        "rotary_base": 500000.0,
        "vocab_size": 100278,
        "norm_scheme": "hybrid_star",
    }
    return {**sizes, **shared, **_RECIPE, "train_samples": math.ceil(tokens / _SEQ_LENGTH), **changes}


def _phd(repeat: int, window: int, chunk: int | None) -> dict[str, Plain]:
    return {"phd_repeat": repeat, "phd_window": window, "phd_chunk": chunk}


_DENSE = {
    "151m": _sizes(12, 768, 2048, 16, 4),
    "285m": _sizes(12, 1024, 4096, 16, 4),
    "550m": _sizes(16, 1536, 4096, 16, 4),
    "543m": _sizes(29, 1024, 4096, 16, 4),
    "1.2b": _sizes(16, 2048, 8192, 32, 8),
}

_EXPERTS: dict[str, Plain] = {
    "num_moe_experts": 64,
    "moe_router_topk": 8,
    "moe_ffn_hidden_size": 1024,
    "moe_router_pre_softmax": True,
    "moe_router_dtype": "fp32",
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.01,
    "moe_z_loss_coeff": 0.001,
    "moe_token_dispatcher_type": "alltoall",
}

_TINY: dict[str, Plain] = {
    "seq_length": 256,
    "norm_scheme": "hybrid_star",
    "split": "95,5,0",
    "micro_batch_size": 8,
    "global_batch_size": 16,
    "eval_interval": 100,
    "eval_iters": 10,
    "lr": 3e-3,
    "min_lr": 3e-4,
    "lr_warmup_fraction": 0.05,
    "train_iters": 400,
}

_SCALING = "Scaling comparison of Pre-Norm and HybridNorm* at 151M, 285M, 550M and 1.2B"

PRESETS: dict[str, Preset] = {
    "dense-151m": Preset(
        "HybridNorm* 151M", HYBRID_NORM, _SCALING, _model(_DENSE["151m"], 200e9), 200e9, (151e6, 151e6), _DENSE_NOTES
    ),
    "dense-285m": Preset(
        "HybridNorm* 285M", HYBRID_NORM, _SCALING, _model(_DENSE["285m"], 200e9), 200e9, (285e6, 285e6), _DENSE_NOTES
    ),
    "dense-550m": Preset(
        "HybridNorm* 550M, 400B tokens",
        HYBRID_NORM,
        "Norm placements at 550M: loss 2.731 (HybridNorm 2.737, Pre-Norm 2.751, Post-Norm 2.760)",
        _model(_DENSE["550m"], 400e9),
        400e9,
        (550e6, 550e6),
        (*_DENSE_NOTES, "the paper's scaling comparison trains 300B tokens: --train-samples 73242188"),
    ),
    "dense-543m": Preset(
        "HybridNorm* 543M, 29 layers",
        HYBRID_NORM,
        "Depth comparison at 29 layers: loss 2.71 (HybridNorm 2.72, Pre-Norm 2.73, Post-Norm diverges)",
        _model(_DENSE["543m"], 400e9),
        400e9,
        (543e6, 543e6),
        (*_DENSE_NOTES, _BUDGET),
    ),
    "dense-1.2b": Preset(
        "HybridNorm* 1.2B",
        HYBRID_NORM,
        "1.2B, 1T tokens: average accuracy 64.15 (HybridNorm 63.25, Pre-Norm 62.99)",
        _model(_DENSE["1.2b"], 1e12),
        1e12,
        (1.2e9, 1.2e9),
        (
            *_DENSE_NOTES,
            "the paper prints an FFN of 9192; its code has 16384 fused, so 8192 was taken: 1.18B parameters",
        ),
    ),
    "dense-7b": Preset(
        "HybridNorm* 7B",
        HYBRID_NORM,
        "7B, 150B tokens: loss 2.430 (Pre-Norm 2.469)",
        _model(
            _sizes(32, 4096, 11008, 32, 32),
            150e9,
            untie_embeddings_and_output_weights=True,
            head_init_method_std=4096**-0.5,
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            norm_scheme="hybrid_star_7b",
        ),
        150e9,
        (7.3e9, 7.3e9),
        (
            "norm_scheme hybrid_star_7b is HybridNorm* with the paper's further norm on the attention output of 7B",
            "the shape is OLMo 2 7B's (7.3B parameters)",
            _DECAY,
            _HEAD,
        ),
    ),
    "moe-1b-7b": Preset(
        "HybridNorm* MoE, 64 experts of which 8 compute",
        HYBRID_NORM,
        "MoE-1B-7B, 500B tokens: average accuracy 66.12 (Pre-Norm 64.95)",
        _model(
            _sizes(16, 2048, 1024, 16, 16),
            500e9,
            **_EXPERTS,
            vocab_size=50280,
            untie_embeddings_and_output_weights=True,
            head_init_method_std=2048**-0.5,
            rotary_base=10000.0,
            expert_model_parallel_size=8,
            lr=4e-4,
            min_lr=5e-5,
            lr_warmup_tokens=2500 * _BATCH_TOKENS,
            decay_embeddings=True,
        ),
        500e9,
        (6.9e9, 1.3e9),
        (
            _SCHEME,
            "softmax over all experts before the choice of eight, as in OLMoE, whose code the paper extends",
            f"norms and embeddings are decayed, {_CODE}",
            _HEAD,
        ),
    ),
    "phd-151m": Preset(
        "PHD-CSWA-2-16-32 151M",
        PHD,
        "Figure 1: training loss against K at 151M",
        _model(_DENSE["151m"], 200e9, norm_scheme="pre", **_phd(2, 16, 32)),
        200e9,
        (151e6, 151e6),
        (*_PHD_RECIPE, "the paper prints no FFN width for 151M; HybridNorm's is taken", _BUDGET),
    ),
    "phd-550m": Preset(
        "PHD-SWA-2-16 550M",
        PHD,
        "Ablations at 550M, 300B tokens: loss 2.753 for K = 2, 2.739 for K = 3, 2.725 for K = 5, vanilla 2.782",
        _model(_DENSE["550m"], 300e9, norm_scheme="pre", **_phd(2, 16, None)),
        300e9,
        (550e6, 550e6),
        (*_PHD_RECIPE, _WIDTH, "--preset phd-550m,phd-swa-5-16 is the row of K = 5; --phd-repeat 1 the vanilla row"),
    ),
    "phd-1.2b": Preset(
        "PHD-CSWA-2-16-32 1.2B",
        PHD,
        "Main table, 1.2B, 500B tokens: loss 2.576, average accuracy 56.2 (vanilla 2.601 and 54.7)",
        _model(_DENSE["1.2b"], 500e9, norm_scheme="pre", **_phd(2, 16, 32)),
        500e9,
        (1.2e9, 1.2e9),
        (*_PHD_RECIPE, _WIDTH, "--preset phd-1.2b,phd-cswa-3-16-32 is the row of K = 3 (2.567 and 56.7)"),
    ),
    "phd-cswa-2-16-32": Preset("K = 2, W = 16, C = 32", PHD, "Main table", _phd(2, 16, 32)),
    "phd-cswa-3-16-32": Preset("K = 3, W = 16, C = 32", PHD, "Main table", _phd(3, 16, 32)),
    "phd-swa-2-16": Preset("K = 2, W = 16, no chunks", PHD, "Ablations at 550M", _phd(2, 16, None)),
    "phd-swa-3-16": Preset("K = 3, W = 16, no chunks", PHD, "Ablations at 550M", _phd(3, 16, None)),
    "phd-swa-5-16": Preset("K = 5, W = 16, no chunks", PHD, "Ablations at 550M", _phd(5, 16, None)),
    "tiny-dense": Preset(
        "HybridNorm* for a CPU", OURS, "nothing; shows the path", {**_sizes(4, 96, 256, 4, 2), **_TINY}
    ),
    "tiny-moe": Preset(
        "HybridNorm* with 8 experts for a CPU",
        OURS,
        "nothing; shows the path",
        {
            **_sizes(4, 64, 192, 4, 2),
            **_EXPERTS,
            "num_moe_experts": 8,
            "moe_router_topk": 2,
            "moe_ffn_hidden_size": 96,
            **_TINY,
        },
    ),
    "tiny-phd": Preset(
        "HybridNorm* PHD-CSWA-2-16-32 for a CPU",
        OURS,
        "nothing; shows the path",
        {**_sizes(4, 96, 256, 4, 2), **_TINY, **_phd(2, 16, 32)},
    ),
}
"""Name -> row."""


def preset_values(names: str) -> dict[str, Plain]:
    """The fields of one preset, or of several whose names are joined by commas; a later one wins.

    Raises:
        UserError: for an unknown name, with the nearest.
    """
    values: dict[str, Plain] = {}
    for name in names.split(","):
        row = PRESETS.get(name.strip())
        if row is None:
            hint = nearest(name, PRESETS) or f"the presets are {', '.join(PRESETS)}"
            raise UserError(f"preset {shown(name.strip())} is not known; {hint}")
        values.update(row.values)
    return values
