"""What a CUDA graph of a training step asks of the machine and the layout, checked before any GPU time is spent."""

from __future__ import annotations

from collections.abc import Iterator

from phd_megatron.config.cuda_graph import is_graphed
from phd_megatron.config.precision import fp8_recipe
from phd_megatron.config.schema import RunConfig
from phd_megatron.runtime.capabilities import Capabilities
from phd_megatron.runtime.parallel_dims import ParallelDims


def graph_machine_problems(run: RunConfig, dims: ParallelDims, capabilities: Capabilities) -> Iterator[str]:
    """Why this machine or this layout cannot have it, one sentence each."""
    if not is_graphed(run.model):
        return
    asked = f"cuda_graph_impl={run.model.transformer['cuda_graph_impl']}"
    if not capabilities.on_cuda:
        yield f"{asked}: CUDA graphs need a CUDA device, and the device is the CPU; use cuda_graph_impl none"
    if fp8_recipe(run.model) == "delayed" and dims.dp > 1:
        yield (
            f"{asked} with fp8_recipe=delayed and data-parallel size {dims.dp}: Transformer Engine would exchange the "
            "largest values of all ranks inside the graph, which has not been run on several GPUs; use fp8_recipe "
            "tensorwise or blockwise, or cuda_graph_impl none"
        )
