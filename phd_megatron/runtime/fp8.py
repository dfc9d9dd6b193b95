"""What FP8 asks of the machine and of every matrix product, checked before any GPU time is spent.

Nothing falls back to bfloat16: a run computes in FP8 what it says, or is refused with the number, the reason and the
cure. Limits are those of Transformer Engine 2.11 (``pytorch/quantization.py``, ``pytorch/utils.py:
assert_dim_for_fp8_exec``, ``common/gemm/cublaslt_gemm.cu``).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from phd_megatron.config.architecture import Architecture, architecture_of
from phd_megatron.config.moe import stacked_experts
from phd_megatron.config.precision import fp8_layers, fp8_recipe
from phd_megatron.config.schema import ModelConfig, RunConfig
from phd_megatron.runtime.capabilities import Capabilities, Version, version_text
from phd_megatron.runtime.parallel_dims import ParallelDims


@dataclass(frozen=True)
class Recipe:
    """What one way to choose the scales needs.

    Attributes:
        transformer_engine: first version that has it.
        from_gpu: first compute capability, and its name.
        below_gpu: first compute capability that it does not run on any more.
        cuda: first version of CUDA, and on which GPUs that matters (up to a compute capability).
        multiple: of both widths of a product and of its rows. On Hopper an FP8 product reads both factors along the
            summed dimension in units of 16: in features forward, out features for the input's gradient, rows for the
            weight's gradient.
        shard_multiple: of the rows that a rank holds where sequence parallelism gathers quantised rows.
        shard_width: of the width of such rows.
    """

    transformer_engine: Version
    from_gpu: tuple[Version, str]
    below_gpu: Version | None = None
    cuda: Version | None = None
    cuda_below_gpu: Version | None = None
    multiple: int = 16
    shard_multiple: int = 8
    shard_width: int = 16


_ADA, _HOPPER, _BLACKWELL = ((8, 9), "Ada"), ((9, 0), "Hopper"), ((10, 0), "Blackwell")
RECIPES = {
    "delayed": Recipe((2, 0), _ADA, cuda=(12, 1), cuda_below_gpu=(9, 0)),
    "tensorwise": Recipe((2, 2), _ADA, cuda=(12, 1), cuda_below_gpu=(9, 0)),
    "blockwise": Recipe((2, 3), _HOPPER, cuda=(12, 9), shard_multiple=128, shard_width=128),
    "mxfp8": Recipe((2, 1), _BLACKWELL, below_gpu=(12, 0), multiple=32, shard_multiple=32, shard_width=32),
}


@dataclass(frozen=True)
class Size:
    """One dimension of a product on one rank: how it comes about, its value, what it has to be a multiple of."""

    formula: str
    value: int
    multiple: int
    cure: str = ""

    @property
    def fits(self) -> bool:
        """Whether it is a multiple."""
        return self.value % self.multiple == 0


def machine_problems(model: ModelConfig, capabilities: Capabilities) -> Iterator[str]:
    """Why this machine cannot compute in the asked recipe."""
    name = fp8_recipe(model)
    if name is None:
        return
    recipe, asked = RECIPES[name], f"fp8={model.transformer['fp8']} with fp8_recipe={name}"
    te, gpu, cuda = capabilities.transformer_engine, capabilities.compute_capability, capabilities.cuda
    without = "leave fp8 out for bfloat16"
    if not capabilities.on_cuda or gpu is None:
        yield f"{asked}: FP8 products need a GPU, and the device is the CPU; {without}"
        return
    if model.transformer_impl == "local":
        yield (
            f"{asked} and transformer_impl=local: Megatron-Core's own layers have no FP8 and would silently compute in "
            f"bfloat16; use transformer_impl auto or transformer_engine, or {without}"
        )
    elif te is None:
        yield (
            f"{asked}: {capabilities.transformer_engine_problem}, and Megatron-Core would silently compute in "
            f"bfloat16; install 'phd-megatron[te]' for this torch and CUDA, or {without}"
        )
    elif te < recipe.transformer_engine:
        yield (
            f"{asked}: Transformer Engine is {version_text(te)}, and this recipe came with "
            f"{version_text(recipe.transformer_engine)}; install a newer one, or another recipe ({_others(te, gpu)})"
        )
    first, generation = recipe.from_gpu
    where = f"{capabilities.device_name} has compute capability {version_text(gpu)}"
    if gpu < first or (recipe.below_gpu is not None and gpu >= recipe.below_gpu):
        most = f" and below {version_text(recipe.below_gpu)}" if recipe.below_gpu else ""
        others = _others(te or (99, 0), gpu)
        cure = f"use fp8_recipe {others}, or {without}" if others else without
        yield f"{asked}: {where}, and it needs {version_text(first)} ({generation}) or newer{most}; {cure}"
    elif recipe.cuda and cuda and cuda < recipe.cuda and gpu < (recipe.cuda_below_gpu or (99, 0)):
        cure = "use fp8_recipe tensorwise" if gpu >= _HOPPER[0] else without
        yield (
            f"{asked}: torch was built with CUDA {version_text(cuda)}, and the product needs "
            f"{version_text(recipe.cuda)} or newer; install such a torch and Transformer Engine, or {cure}"
        )


def _others(te: Version, gpu: Version) -> str:
    """Recipes that this GPU and Transformer Engine have, but for CUDA's version."""
    return ", ".join(
        name
        for name, recipe in RECIPES.items()
        if te >= recipe.transformer_engine
        and gpu >= recipe.from_gpu[0]
        and (recipe.below_gpu is None or gpu < recipe.below_gpu)
    )


def size_problems(run: RunConfig, dims: ParallelDims) -> Iterator[str]:
    """Dimensions of products that FP8 cannot compute: which, its value, and what to pad to.

    Evaluation has the rows of a training micro-batch, and a batch-size ramp changes their number alone. Padding of
    what an expert gets is Megatron-Core's (``TEGroupedMLP``, ``SequentialMLP``). Embedding, router, head
    and experts of another backend are no FP8 products.
    """
    name, layers = fp8_recipe(run.model), fp8_layers(run.model)
    if name is None or not layers:
        return
    for size in _widths(architecture_of(run.model), layers, dims, RECIPES[name], not stacked_experts(run)):
        if not size.fits:
            yield (
                f"fp8_recipe={name}: {size.formula} = {size.value} is not a multiple of {size.multiple}, which the "
                f"widths of FP8 products are; use {size.cure}, or leave fp8 out"
            )
    rows = list(_rows(run, layers, dims, RECIPES[name]))
    if wrong := [size for size in rows if not size.fits]:
        found = "; ".join(f"{size.formula} = {size.value} is not a multiple of {size.multiple}" for size in wrong)
        yield (
            f"fp8_recipe={name}: {found}, which the rows of FP8 products are; use "
            f"seq_length={_fitting_length(run, dims, rows)}, another micro_batch_size, or leave fp8 out"
        )


def _widths(a: Architecture, layers: range, dims: ParallelDims, recipe: Recipe, fp8_experts: bool) -> Iterator[Size]:
    heads, groups, channels, moe = a.heads, a.groups, a.head_dim, a.moe
    unit, tp = recipe.multiple, ("tensor_model_parallel_size", dims.tp)
    yield _width("hidden_size", a.hidden_size, ("", 1), recipe.shard_width if dims.sp else unit)
    for number, what in (
        (heads + 2 * groups, f"(num_attention_heads {heads} + 2 x num_query_groups {groups})"),
        (heads, f"num_attention_heads {heads}"),
    ):
        formula, width = f"{what} x kv_channels {channels}{_over(tp)}", number * channels // dims.tp
        step = unit * dims.tp // math.gcd(unit * dims.tp, number)
        yield Size(formula, width, unit, f"kv_channels={_round_up(channels, step)}")
    if moe is None or not all(moe.layers[layer] for layer in layers):
        yield _width("ffn_hidden_size", a.ffn_hidden_size, tp, unit)
    if moe is not None and any(moe.layers[layer] for layer in layers):
        if fp8_experts:
            yield _width("moe_ffn_hidden_size", moe.ffn_hidden_size, ("expert_tensor_parallel_size", dims.etp), unit)
        if moe.shared_hidden_size:
            yield _width("moe_shared_expert_intermediate_size", moe.shared_hidden_size, tp, unit)


def _width(field: str, total: int, parts: tuple[str, int], multiple: int) -> Size:
    cure = f"{field}={_round_up(total, multiple * parts[1])}"
    return Size(f"{field} {total}{_over(parts)}" if parts[1] > 1 else field, total // parts[1], multiple, cure)


def _over(parts: tuple[str, int]) -> str:
    return f" / {parts[0]} {parts[1]}" if parts[1] > 1 else ""


def _rows(run: RunConfig, fp8: range, dims: ParallelDims, recipe: Recipe) -> Iterator[Size]:
    """Rows of the products of a micro-batch: of all copies, and of the last one where the last layer is pruned."""
    model, size, layers = run.model, run.training.micro_batch_size, run.model.num_layers
    assert layers is not None  # checked by resolve
    kinds = [(model.phd_repeat, "")]
    lone_head = dims.split.layers(layers)[-1] == 0  # its last layer computes all copies
    if model.phd_repeat > 1 and model.phd_last_layer_pruning and not lone_head and layers - 1 in fp8:
        kinds.append((1, " of the last copy, alone in the last layer,"))
    cp, tp = ("context_parallel_size", dims.cp), ("tensor_model_parallel_size", dims.tp)
    for copies, about in kinds:
        repeat = f" x phd_repeat {copies}" if copies > 1 else ""
        formula = f"seq_length {model.seq_length}{repeat} x micro_batch_size {size}{_over(cp)}"
        whole = model.seq_length * copies * size // dims.cp
        # Attention and FFN gather the rows of the tensor ranks, so their products see all of them.
        yield Size(f"{formula} rows{about}", whole, recipe.multiple)
        if dims.sp:
            yield Size(f"{formula}{_over(tp)} rows{about}", whole // dims.tp, recipe.shard_multiple)


def _fitting_length(run: RunConfig, dims: ParallelDims, rows: list[Size]) -> int:
    """The next longer ``seq_length`` with which every number of rows fits, and that the layout can cut."""
    length = run.model.seq_length
    step = (2 * dims.cp if dims.cp > 1 else 1) * (dims.tp if dims.sp else 1)
    for size in rows:  # value = length * numerator / denominator
        share = math.gcd(length, size.value)
        numerator, needed = size.value // share, size.multiple * (length // share)
        step = math.lcm(step, needed // math.gcd(needed, numerator))
    return _round_up(length, step)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def forget_fp8_scales() -> None:
    """Transformer Engine keeps the scales of all layers that ever were, and their process group: let go of them."""
    if te := sys.modules.get("transformer_engine.pytorch.fp8"):
        te.FP8GlobalStateManager.reset()
