"""FP8 in a configuration: which fields belong to it, which combinations cannot be, and which layers compute in it.

What the machine and the layout must bring is :mod:`phd_megatron.runtime.fp8`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

from phd_megatron.config.cuda_graph import drop_graph
from phd_megatron.config.moe import stacked_experts
from phd_megatron.config.schema import ModelConfig, RunConfig

_PADDING = "moe_router_padding_for_quantization"
DEPENDENT = (
    "fp8_*",
    "tp_only_amax_red",
    "first_last_layers_bf16",
    "num_layers_at_start_in_bf16",
    "num_layers_at_end_in_bf16",
    _PADDING,
    "activation_func_fp8_input_store",
)
"""``TransformerConfig`` fields (and a pattern) that have no effect without ``fp8``."""

_LIBRARIES = (
    "moe_grouped_gemm",
    "moe_permute_fusion",
    "moe_router_fusion",
    "tp_comm_*",
    "gradient_accumulation_fusion",
    "cross_entropy_*",
)
"""Fields that choose among implementations of which some need a GPU's libraries."""

_DELAYED_ONLY = {
    "fp8_margin": 0,
    "fp8_amax_history_len": 1,
    "fp8_amax_compute_algo": "most_recent",
    "fp8_wgrad": True,
    "tp_only_amax_red": False,
}
"""Read by the delayed recipe alone, with Megatron-Core's defaults."""


def fp8_recipe(model: ModelConfig) -> str | None:
    """Name of the recipe, None for a model without FP8. ``delayed`` is Megatron-Core's default."""
    extra = model.transformer
    return str(extra.get("fp8_recipe") or "delayed") if extra.get("fp8") else None


def drop_fp8(model: ModelConfig) -> bool:
    """Make it the same model in its own type; whether it had FP8. FP8 changes how products are computed, no weight."""
    had = bool(model.transformer.pop("fp8", None))
    for name in [n for n in model.transformer if any(fnmatchcase(n, pattern) for pattern in DEPENDENT)]:
        del model.transformer[name]
    return had


def switched_off(model: ModelConfig) -> list[str]:
    """``fp8: null`` over a checkpoint that had FP8 leaves out what belongs to it too; a note if there was anything."""
    extra = model.transformer
    if "fp8" not in extra or extra["fp8"]:
        return []
    before = dict(extra)
    drop_fp8(model)
    left = ", ".join(f"{name}={value}" for name, value in before.items() if name not in extra and value)
    return [f"fp8=null: {left} left out with it"] if left else []


def without_padding(config: RunConfig) -> list[str]:
    """Leave padding out where experts stay in bfloat16, which needs none; a note if it was set beside FP8."""
    extra = config.model.transformer
    if not (extra.get("fp8") and extra.get(_PADDING) and stacked_experts(config)):
        return []
    del extra[_PADDING]
    return [f"{_PADDING}=True left out: experts in bfloat16 need none; those of moe_experts_backend te are FP8"]


def for_cpu(model: ModelConfig) -> list[str]:
    """Make it the same model with what every machine has, in place; notes on what changes the numbers a little."""
    model.transformer_impl, model.moe_experts_backend = "local", "auto"
    drop_graph(model)
    for name in [n for n in model.transformer if any(fnmatchcase(n, pattern) for pattern in _LIBRARIES)]:
        del model.transformer[name]
    return ["fp8 is left out: this machine computes in the checkpoint's own type"] if drop_fp8(model) else []


def fp8_layers(model: ModelConfig) -> range:
    """0-based global numbers of the layers whose products are FP8; empty without FP8."""
    extra, layers = model.transformer, model.num_layers
    assert layers is not None  # checked by resolve
    if not extra.get("fp8"):
        return range(0)
    if not extra.get("first_last_layers_bf16"):
        return range(layers)
    first, last = (extra.get(f"num_layers_at_{end}_in_bf16", 1) for end in ("start", "end"))
    return range(first, layers - last)


def precision_problems(config: RunConfig) -> Iterator[str]:
    """What no machine could compute, one sentence each."""
    model, extra = config.model, config.model.transformer
    recipe = fp8_recipe(model)
    if recipe is None:
        return
    name = f"fp8={extra['fp8']} with fp8_recipe={recipe}"
    if not config.training.bf16:
        other = "fp16=True, whose loss scaling is not tested with FP8" if config.training.fp16 else "float32 parameters"
        yield f"{name} and {other}: what is not an FP8 product is bfloat16; set bf16 (--bf16)"
    if recipe == "delayed":
        yield from _delayed(model)
    else:
        for field, default in _DELAYED_ONLY.items():
            if extra.get(field, default) != default:
                yield f"{field}={extra[field]!r}: fp8_recipe={recipe} does not read it; leave it out, or use delayed"
    yield from _parameters(config, recipe)
    if extra.get("fp8_interval", 1) != 1:
        yield f"fp8_interval={extra['fp8_interval']}: Transformer Engine ignores it since 1.8; leave it out"
    yield from _bf16_layers(config)


def _parameters(config: RunConfig, recipe: str) -> Iterator[str]:
    if not config.model.transformer.get("fp8_param"):
        return
    if not config.parallel.use_distributed_optimizer:
        yield (
            "fp8_param=True without use_distributed_optimizer: Megatron-Core's plain optimizer cannot write FP8 "
            "weights; turn it on, or leave fp8_param out"
        )
    if recipe == "mxfp8":
        yield "fp8_param=True with fp8_recipe=mxfp8: it needs a gather of its own, which is not built; leave it out"
    if config.logging.dump_gradients_dir is not None:
        yield (
            f"dump_gradients_dir={config.logging.dump_gradients_dir} with fp8_param=True: gradients are found by the "
            "memory of weights in the model's own type; leave one of them out"
        )


def _delayed(model: ModelConfig) -> Iterator[str]:
    """Its scales come from the steps before, so it has to see every step of every layer in the same way."""
    extra = model.transformer
    if extra.get("first_last_layers_bf16"):
        yield (
            "first_last_layers_bf16=True with fp8_recipe=delayed: delayed scales are updated for all layers at once, "
            "so none can be left out; use fp8_recipe tensorwise or blockwise"
        )
    recomputed = [part for part in extra.get("recompute_modules") or [] if part in ("layernorm", "moe_act")]
    if recomputed and extra.get("recompute_granularity") == "selective":
        yield (
            f"recompute_modules={recomputed} with fp8_recipe=delayed: a linear layer would quantise its input a second "
            "time, with another scale; use fp8_recipe tensorwise or blockwise, or other recompute_modules"
        )


def _bf16_layers(config: RunConfig) -> Iterator[str]:
    model, extra = config.model, config.model.transformer
    if not extra.get("first_last_layers_bf16") or model.num_layers is None:
        return
    most = model.num_layers // max(config.parallel.pipeline_model_parallel_size, 1)
    fits = True
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        if not 0 <= extra.get(name, 1) <= most:
            fits = False
            yield (
                f"{name}={extra.get(name, 1)} is not from 0 to {most}, the layers of a pipeline stage (Megatron-Core's "
                "rule); lower it"
            )
    if fits and not fp8_layers(model):
        yield (
            f"first_last_layers_bf16=True leaves none of num_layers={model.num_layers} to FP8; lower "
            "num_layers_at_start_in_bf16 or num_layers_at_end_in_bf16, or leave fp8 out"
        )
