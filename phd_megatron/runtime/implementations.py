"""Which implementation computes each operation, and why: the one place that decides, and the table that says so.

``pretrain`` prints the table once at its start, ``phd-megatron doctor`` prints it for the machine it runs on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from phd_megatron.config.architecture import head_dim
from phd_megatron.config.cuda_graph import is_graphed, warm_up_steps
from phd_megatron.config.deepspeed import offloads, zero_stage
from phd_megatron.config.moe import stacked_experts
from phd_megatron.config.precision import fp8_layers, fp8_recipe
from phd_megatron.config.schema import ModelConfig, RunConfig
from phd_megatron.errors import UserError
from phd_megatron.kernels.phd_attention import choose_backend
from phd_megatron.kernels.qkv_norm_rope import is_chosen, width_problem
from phd_megatron.norm.schemes import norm_plan
from phd_megatron.runtime.capabilities import Capabilities, version_text
from phd_megatron.runtime.dtypes import params_dtype
from phd_megatron.runtime.expert_backends import experts_backend


@dataclass(frozen=True)
class Operation:
    """An operation, the implementation that will run it here, and why that one."""

    name: str
    implementation: str
    reason: str


def use_transformer_engine(transformer_impl: str, capabilities: Capabilities) -> tuple[bool, str]:
    """Whether layers come from Transformer Engine, and why.

    Raises:
        UserError: if it is asked for and cannot be had.
    """
    if transformer_impl == "local":
        return False, "asked for by transformer_impl=local"
    if capabilities.transformer_engine is not None:
        how = "asked for" if transformer_impl == "transformer_engine" else "transformer_impl=auto takes it"
        return True, f"{how}: Transformer Engine {version_text(capabilities.transformer_engine)} is installed"
    if transformer_impl == "transformer_engine":
        raise UserError(
            f"transformer_impl=transformer_engine, but {capabilities.transformer_engine_problem}; use "
            "transformer_impl=auto, or install 'phd-megatron[te]' on a GPU machine"
        )
    return False, capabilities.transformer_engine_problem


_USUAL_WIDTH = 64
"""Of a head, where a model does not say it."""
_ONLY_THERE = (
    "moe_permute_fusion",
    "moe_router_fusion",
    "tp_comm_overlap",
    "use_te_activation_func",
)


def require_transformer_engine(model: ModelConfig, capabilities: Capabilities) -> None:
    """Refuse what only Transformer Engine's layers do, where they are not used.

    Raises:
        UserError: naming each field.
    """
    te, why = use_transformer_engine(model.transformer_impl, capabilities)
    extra = model.transformer
    asked = [f"{name}={extra[name]!r}" for name in _ONLY_THERE if extra.get(name)]
    if extra.get("cross_entropy_loss_fusion") and extra.get("cross_entropy_fusion_impl") == "te":
        asked.append("cross_entropy_fusion_impl='te'")
    if asked and not te:
        raise UserError(
            f"{', '.join(asked)}: only Transformer Engine does that, and it is not used here ({why}); leave it out, or "
            "run where it is"
        )


def gradient_accumulation(run: RunConfig, capabilities: Capabilities) -> tuple[Literal["", "te", "all"], str]:
    """Which weights' gradients a GEMM adds to the gradient buffer itself, and why: none, Transformer Engine's, all.

    ``all`` has Megatron-Core's own layers too, of which the head is one. Apex does it where that is installed, and
    torch where it is asked for.

    Raises:
        UserError: if it is asked for and cannot be had.
    """
    if run.parallel.deepspeed:
        return "", "DeepSpeed takes gradients from autograd"
    model = run.model
    asked = model.transformer.get("gradient_accumulation_fusion")
    if asked is False:
        return "", "asked for by gradient_accumulation_fusion=False"
    te, why = use_transformer_engine(model.transformer_impl, capabilities)
    if capabilities.apex_weight_gradient:
        return "all", "apex's fused_weight_gradient_mlp_cuda is installed"
    if asked and capabilities.weight_gradient_problem is None:
        return "all", "asked for by gradient_accumulation_fusion=True; torch's addmm adds to the gradient buffer"
    if te:
        return (
            "te",
            "Transformer Engine's layers do so themselves; the head's is added with gradient_accumulation_fusion",
        )
    if asked:
        raise UserError(
            "gradient_accumulation_fusion=True needs Transformer Engine, apex's fused_weight_gradient_mlp_cuda or "
            f"another torch: {why}, and {capabilities.weight_gradient_problem}; leave it out, or install one of them"
        )
    return "", f"Transformer Engine's layers and apex do so unasked, and {why}"


def fused_norms(model: ModelConfig, transformer_engine: bool) -> bool:
    """Whether a norm whose output only a linear layer reads is computed inside that layer.

    Not where the norms are recomputed: Megatron-Core recomputes a norm of its own only.
    """
    recomputed = model.transformer.get("recompute_modules") or []
    return transformer_engine and "layernorm" not in recomputed


def operations(run: RunConfig, capabilities: Capabilities) -> list[Operation]:
    """The table for a run on a machine. ``run`` need not be resolved.

    Raises:
        UserError: if an implementation is asked for and cannot be had.
    """
    return [
        _attention(run, capabilities),
        *_layers(run, capabilities),
        *_precision(run, capabilities),
        *_step(run, capabilities),
    ]


def format_operations(rows: Sequence[Operation]) -> str:
    """The table as text, one line an operation."""
    name, implementation = (max(len(getattr(row, field)) for row in rows) for field in ("name", "implementation"))
    return "\n".join(f"  {row.name:<{name}}  {row.implementation:<{implementation}}  {row.reason}" for row in rows)


def _attention(run: RunConfig, capabilities: Capabilities) -> Operation:
    import torch

    model, name = run.model, "PHD attention"
    try:
        chosen, reason = choose_backend(
            torch.device(capabilities.device),
            params_dtype(run),
            head_dim(model) or _USUAL_WIDTH,
            backend=model.phd_attention_backend,
        )
    except UserError:
        raise
    except Exception as error:  # what is broken is reported; the report must not break with it
        return Operation(name, "not available", f"{type(error).__name__}: {error}")
    return Operation(name, chosen, reason)


def _layers(run: RunConfig, capabilities: Capabilities) -> Iterator[Operation]:
    model, extra = run.model, run.model.transformer
    te, why = use_transformer_engine(model.transformer_impl, capabilities)
    yield Operation("linear layers", "Transformer Engine" if te else "torch matmul (Megatron's local layers)", why)
    yield Operation("embedding and head", "torch matmul (Megatron's local layers)", "Megatron-Core has no others")
    yield Operation("norms", *_norms(model, te, why))
    yield Operation("q/k/v norm and RoPE", *_norm_rope(model, capabilities))
    if model.gated_linear_unit:
        yield Operation("SwiGLU", *_ours(capabilities, "one kernel each way"))
    else:
        yield Operation("GELU", "torch", "gated_linear_unit=False")
    if extra.get("num_moe_experts") is not None:
        yield _experts(run, te, capabilities)


_TRITON, _TORCH = "phd_megatron.kernels, Triton", "phd_megatron.kernels, torch operations"


def _ours(capabilities: Capabilities, reason: str) -> tuple[str, str]:
    """One of our operations with a Triton kernel for the GPU."""
    problem = capabilities.triton_problem
    return (_TRITON, reason) if problem is None else (_TORCH, f"no Triton kernel: {problem}")


def _norm_rope(model: ModelConfig, capabilities: Capabilities) -> tuple[str, str]:
    if model.normalization != "RMSNorm":
        return _TORCH, "the Triton kernel knows RMSNorm alone"
    problem = capabilities.triton_problem or width_problem(head_dim(model) or _USUAL_WIDTH)
    if is_chosen(model.phd_attention_backend, problem):
        return _TRITON, "one kernel with the split of QKV; norms of full width are torch's"
    if model.phd_attention_backend == "auto":
        return _TORCH, f"no Triton kernel: {problem}"
    return _TORCH, f"phd_attention_backend={model.phd_attention_backend}: its kernel comes with auto or a Triton one"


def _norms(model: ModelConfig, te: bool, why: str) -> tuple[str, str]:
    if not te:
        return "torch rms_norm / layer_norm", why
    if not fused_norms(model, te):
        return "Transformer Engine", "on their own, since recompute_modules has layernorm"
    plan = norm_plan(model.norm_scheme, model.num_layers or 1)
    sublayers = [part for block in plan for part in (block.attention, block.mlp)]
    inside = sum(part.input_norm and part.residual == "raw" for part in sublayers)
    return "Transformer Engine", (
        f"{inside} of {len(sublayers)} sublayers of {model.norm_scheme} have an input norm that only a linear layer "
        "reads: inside that layer, but for experts; the others on their own; those of single heads are torch's"
    )


def _experts(run: RunConfig, te: bool, capabilities: Capabilities) -> Operation:
    backend, why = experts_backend(run, te, capabilities)
    implementation = {
        "grouped_mm": "torch grouped_mm, weights stacked",
        "te": "Transformer Engine grouped GEMM",
        "sequential": f"{'Transformer Engine' if te else 'torch'}, one GEMM per expert",
    }[backend]
    if fp8_recipe(run.model) and stacked_experts(run):
        why += "; in bfloat16, which was the quicker"
    return Operation("experts", implementation, why)


def _precision(run: RunConfig, capabilities: Capabilities) -> Iterator[Operation]:
    recipe = fp8_recipe(run.model)
    if recipe is None:
        usable = capabilities.transformer_engine is not None and run.model.transformer_impl != "local"
        yield Operation("FP8", "not used", "fp8 is not set" if usable else capabilities.transformer_engine_problem)
        return
    layers = fp8_layers(run.model)
    experts = "experts, " if run.model.transformer.get("num_moe_experts") and stacked_experts(run) else ""
    yield Operation(
        "FP8",
        f"{run.model.transformer['fp8']}, {recipe}",
        f"linear layers of blocks {layers[0]} to {layers[-1]} of {run.model.num_layers}; embedding, attention, "
        f"{experts}router, norms and head stay in bfloat16",
    )
    held = bool(run.model.transformer.get("fp8_param"))
    yield Operation("weights of those", "FP8" if held else "bfloat16", f"fp8_param is {'' if held else 'not '}set")


def _step(run: RunConfig, capabilities: Capabilities) -> Iterator[Operation]:
    extra = run.model.transformer
    if extra.get("cross_entropy_loss_fusion"):
        kind = extra.get("cross_entropy_fusion_impl", "native")
        yield Operation("cross entropy", f"fused ({kind})", "asked for by cross_entropy_loss_fusion")
    else:
        implementation, why = _ours(capabilities, "half-precision logits, their gradient written over them")
        if capabilities.triton_problem is not None:
            implementation = "Megatron's vocabulary-parallel"
        yield Operation("cross entropy", implementation, why)
    fusion, why = gradient_accumulation(run, capabilities)
    where = {"": "after the GEMM", "te": "inside Transformer Engine's GEMMs", "all": "inside the GEMMs"}
    yield Operation("gradient accumulation", where[fusion], why)
    if run.parallel.deepspeed:
        yield Operation("optimizer", *_zero(run))
        yield Operation("gradient norm and clipping", "DeepSpeed", "asked for by deepspeed")
        yield from _after_optimizer(run)
        return
    # Megatron-Core takes the first of these that imports, whatever transformer_impl says.
    te, order = capabilities.transformer_engine is not None, "Megatron's order is Transformer Engine, apex, torch"
    library = "Transformer Engine" if te else "apex" if capabilities.apex_adam else ""
    why = order if library else f"{order}; {capabilities.transformer_engine_problem}"
    yield Operation("optimizer", f"{library} FusedAdam" if library else "torch AdamW(fused=True)", why)
    yield Operation("gradient norm and clipping", f"{library} multi-tensor" if library else "torch, per tensor", why)
    yield from _after_optimizer(run)


def _zero(run: RunConfig) -> tuple[str, str]:
    stage = zero_stage(run)
    held = {"offload_optimizer": "states", "offload_param": "parameters"}
    on_host = " and ".join(what for name, what in held.items() if offloads(run, name))
    return f"DeepSpeed ZeRO-{stage}" + (f", {on_host} on the host" if on_host else ""), "asked for by deepspeed"


def _after_optimizer(run: RunConfig) -> Iterator[Operation]:
    extra = run.model.transformer
    if is_graphed(run.model):
        first = warm_up_steps(run.model)
        why = f"cuda_graph_impl=local; recorded after {first} steps of a process; evaluation is not in it"
        yield Operation("training step", "CUDA graph of forward and backward", why)
    else:
        yield Operation("training step", "operations launched one by one", "cuda_graph_impl is not set")
    overlap = extra.get("tp_comm_overlap")
    if run.parallel.tensor_model_parallel_size > 1:
        yield Operation(
            "tensor-parallel communication",
            "Transformer Engine userbuffers, overlapped" if overlap else "collectives around the GEMMs",
            f"tp_comm_overlap is {'set' if overlap else 'not set'}",
        )


def table(run: RunConfig, capabilities: Capabilities) -> str:
    """What ``pretrain`` prints at its start."""
    return f"implementations on {capabilities.device_name}:\n{format_operations(operations(run, capabilities))}"
