"""Everything that a run asks of the machine and its libraries, checked at once and before anything is built."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from phd_megatron.config.cuda_graph import is_graphed
from phd_megatron.config.precision import fp8_recipe
from phd_megatron.config.schema import RunConfig
from phd_megatron.errors import UserError, raise_all
from phd_megatron.runtime.capabilities import Capabilities
from phd_megatron.runtime.deepspeed import require_deepspeed
from phd_megatron.runtime.expert_backends import experts_backend, plain_problem
from phd_megatron.runtime.flex_dispatcher import flex_problems
from phd_megatron.runtime.fp8 import machine_problems, size_problems
from phd_megatron.runtime.implementations import (
    gradient_accumulation,
    require_transformer_engine,
    use_transformer_engine,
)
from phd_megatron.runtime.mcore_versions import MUON_SINCE, SKIP_SINCE, installed, numbers
from phd_megatron.runtime.parallel_dims import ParallelDims
from phd_megatron.runtime.userbuffers import overlap_problems


def require(run: RunConfig, dims: ParallelDims, capabilities: Capabilities) -> None:
    """Refuse a resolved run that this machine or this layout would compute otherwise than asked.

    Megatron-Core goes on without what it lacks: FP8 becomes bfloat16, fused layers plain ones.

    Raises:
        UserError: with value, reason and cure of each problem.
    """
    require_transformer_engine(run.model, capabilities)
    gradient_accumulation(run, capabilities)
    if run.model.transformer.get("num_moe_experts") is not None:
        layers, _ = use_transformer_engine(run.model.transformer_impl, capabilities)
        experts_backend(run, layers, capabilities)
    raise_all(
        [
            *machine_problems(run.model, capabilities),
            *size_problems(run, dims),
            *overlap_problems(run, dims, capabilities),
            *flex_problems(run, dims, capabilities),
            *graph_machine_problems(run, dims, capabilities),
        ]
    )


def graph_machine_problems(run: RunConfig, dims: ParallelDims, capabilities: Capabilities) -> Iterator[str]:
    """Why this machine or this layout cannot have a step as a CUDA graph, one sentence each."""
    if not is_graphed(run.model):
        return
    asked = f"cuda_graph_impl={run.model.transformer['cuda_graph_impl']}"
    if not capabilities.on_cuda:
        yield f"{asked}: CUDA graphs need a CUDA device, and the device is the CPU; use cuda_graph_impl none"
    if run.model.transformer.get("num_moe_experts") is not None and (problem := plain_problem(run, capabilities)):
        yield (
            f"{asked} with experts that are multiplied one by one, for which the host reads how many rows each has: "
            f"{problem}; use bf16 and widths that are multiples of 8, or cuda_graph_impl none"
        )
    if fp8_recipe(run.model) == "delayed" and dims.dp > 1:
        yield (
            f"{asked} with fp8_recipe=delayed and data-parallel size {dims.dp}: Transformer Engine would exchange the "
            "largest values of all ranks inside the graph, which has not been run on several GPUs; use fp8_recipe "
            "tensorwise or blockwise, or cuda_graph_impl none"
        )


def _require_megatron(what: str, since: str, otherwise: str) -> None:
    here = installed()
    if here is not None and here < numbers(since):
        raise UserError(
            f"{what} needs megatron-core {since} or later, which needs Python 3.12, and {'.'.join(map(str, here))} is "
            f"installed: pip install 'megatron-core>={since}', or {otherwise}"
        )


def require_optimizer(run: RunConfig) -> None:
    """Refuse a run to be trained whose optimizer the installed packages do not have; others read its checkpoints.

    Raises:
        UserError: with the reason and the cure.
    """
    require_deepspeed(run)
    asked = run.optimizer
    if asked.grad_norm_skip_threshold is not None:
        _require_megatron(
            f"grad_norm_skip_threshold={asked.grad_norm_skip_threshold:g}",
            SKIP_SINCE,
            "give null: clip_grad bounds every step",
        )
    if asked.optimizer != "muon":
        return
    _require_megatron("optimizer=muon", MUON_SINCE, "use adam")
    if importlib.util.find_spec("emerging_optimizers") is None:
        raise UserError(
            "optimizer=muon needs emerging-optimizers: pip install 'emerging-optimizers>=0.3,<0.4', or use adam"
        )
