"""What Megatron-Core's ``flex`` dispatcher (DeepEP, HybridEP) asks of the machine and of the layout."""

from __future__ import annotations

from collections.abc import Iterator

from phd_megatron.config.moe import moe_value
from phd_megatron.config.schema import RunConfig
from phd_megatron.runtime.capabilities import Capabilities
from phd_megatron.runtime.parallel_dims import ParallelDims

_CURE = "use moe_token_dispatcher_type alltoall"


def flex_problems(run: RunConfig, dims: ParallelDims, capabilities: Capabilities) -> Iterator[str]:
    """Why a run cannot have it here, one sentence each; Megatron-Core would stop after it has built half a model."""
    if moe_value(run.model, "moe_token_dispatcher_type") != "flex":
        return
    backend = moe_value(run.model, "moe_flex_dispatcher_backend")
    asked = f"moe_token_dispatcher_type=flex with moe_flex_dispatcher_backend={backend}"
    problem = capabilities.hybridep_problem if backend == "hybridep" else capabilities.deepep_problem
    if problem is not None:
        install = "install github.com/deepseek-ai/DeepEP, or " if capabilities.on_cuda else ""
        yield f"{asked}: {problem}; {install}{_CURE}"
    if dims.ep * dims.etp == 1:
        yield (
            f"{asked}, expert_model_parallel_size=1 and expert_tensor_parallel_size=1: every rank has all experts, "
            f"so there is nothing to send; {_CURE}, which sends nothing then"
        )
    if moe_value(run.model, "moe_router_dtype") != "fp32":
        yield f"{asked}: it sends weights in float32; set moe_router_dtype fp32, or {_CURE}"
