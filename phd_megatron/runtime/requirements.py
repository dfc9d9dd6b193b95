"""Everything that a run asks of the machine and its libraries, checked at once and before anything is built."""

from __future__ import annotations

from phd_megatron.config.schema import RunConfig
from phd_megatron.errors import raise_all
from phd_megatron.runtime.capabilities import Capabilities
from phd_megatron.runtime.cuda_graph import graph_machine_problems
from phd_megatron.runtime.fp8 import machine_problems, size_problems
from phd_megatron.runtime.implementations import gradient_accumulation, require_transformer_engine
from phd_megatron.runtime.parallel_dims import ParallelDims
from phd_megatron.runtime.userbuffers import overlap_problems


def require(run: RunConfig, dims: ParallelDims, capabilities: Capabilities) -> None:
    """Refuse a resolved run that this machine or this layout would compute otherwise than asked.

    Megatron-Core goes on without what it lacks: FP8 becomes bfloat16, fused layers plain ones.

    Raises:
        UserError: with value, reason and cure of each problem.
    """
    require_transformer_engine(run.model, capabilities)
    gradient_accumulation(run.model, capabilities)
    raise_all(
        [
            *machine_problems(run.model, capabilities),
            *size_problems(run, dims),
            *overlap_problems(run, dims, capabilities),
            *graph_machine_problems(run, dims, capabilities),
        ]
    )
