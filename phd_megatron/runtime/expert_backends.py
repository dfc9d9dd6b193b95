"""Which implementation multiplies the experts of a layer, and why.

``grouped_mm`` is :class:`~phd_megatron.model.experts.StackedExperts`, ``te`` Megatron-Core's ``TEGroupedMLP`` and
``sequential`` its ``SequentialMLP``. All three have the same parameters in checkpoints.
"""

from __future__ import annotations

from phd_megatron.config.architecture import architecture_of
from phd_megatron.config.moe import UNCOUNTED, stacked_experts
from phd_megatron.config.precision import fp8_recipe
from phd_megatron.config.schema import RunConfig
from phd_megatron.errors import UserError
from phd_megatron.kernels.grouped_mm import grouped_mm_problem, width_problem
from phd_megatron.runtime.capabilities import Capabilities
from phd_megatron.runtime.dtypes import params_dtype
from phd_megatron.runtime.parallel_dims import expert_tensor_size

_PLAIN = "one product per expert, for which the host reads how many rows each has"


def experts_backend(run: RunConfig, transformer_engine: bool, capabilities: Capabilities) -> tuple[str, str]:
    """``grouped_mm``, ``te`` or ``sequential`` for a model with experts, and why.

    ``auto`` takes ``grouped_mm``: on an H200 it needed 4.8 to 5.4 ms for a layer's products forward and backward where
    Transformer Engine's took 13.7 to 27.8, most of it the host's (64 experts, 65,536 rows, 2048 x 1024, bfloat16). In
    FP8 Transformer Engine's were slower still (docs/benchmarks.md), so experts stay in bfloat16 beside FP8 layers.

    Raises:
        UserError: if one is asked for and cannot be had, or something else that it does not do.
    """
    backend, why = _choose(run, transformer_engine, capabilities)
    extra = run.model.transformer
    asked = {
        "moe_grouped_gemm=True": extra.get("moe_grouped_gemm"),
        "recompute_modules with moe_act": "moe_act" in (extra.get("recompute_modules") or []),
    }
    if backend == "sequential" and (grouped := ", ".join(name for name, given in asked.items() if given)):
        raise UserError(
            f"{grouped}: that is of grouped experts, and these are computed one after another: {why}; leave it out"
        )
    return backend, why


def _choose(run: RunConfig, transformer_engine: bool, capabilities: Capabilities) -> tuple[str, str]:
    asked = run.model.moe_experts_backend
    grouped = bool(run.model.transformer.get("moe_grouped_gemm"))
    if asked == "te":
        if not transformer_engine:
            raise UserError(
                "moe_experts_backend=te needs Transformer Engine's layers, which are not used here: "
                f"{capabilities.transformer_engine_problem or 'transformer_impl=local'}; use auto or grouped_mm"
            )
        return "te", "asked for by moe_experts_backend=te"
    if asked == "sequential":
        return "sequential", "asked for by moe_experts_backend=sequential"
    if not stacked_experts(run):
        if grouped and transformer_engine:
            return "te", "muon works on matrices of single experts, and moe_grouped_gemm is set"
        return "sequential", "muon works on matrices of single experts"
    how = "asked for" if asked == "grouped_mm" else "moe_experts_backend=auto takes it"
    problem = plain_problem(run, capabilities)
    if problem is None:
        waits = "the host reads counts" if _reads_counts(run) else "nothing waits for the host"
        return "grouped_mm", f"{how}: one product for all experts, {waits}"
    if asked == "auto" and capabilities.on_cuda and grouped and transformer_engine and not fp8_recipe(run.model):
        return "te", f"moe_grouped_gemm is set, and {problem}"
    return "grouped_mm", f"{how}: {_PLAIN}, since {problem}"


def _reads_counts(run: RunConfig) -> bool:
    divided = run.parallel.expert_model_parallel_size * expert_tensor_size(run.parallel) > 1
    return divided or any(map(run.model.transformer.get, UNCOUNTED))


def plain_problem(run: RunConfig, capabilities: Capabilities) -> str | None:
    """Why stacked experts cannot be multiplied in one product here, or None where they are."""
    if problem := grouped_mm_problem(params_dtype(run), capabilities.compute_capability):
        return problem
    found = architecture_of(run.model)
    assert found.moe is not None
    return width_problem(found.hidden_size, found.moe.ffn_hidden_size // expert_tensor_size(run.parallel))
