"""What a checkpoint holds: the state of model, optimizer, schedule and random numbers, and the layout's facts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject

from phd_megatron.model.quantised import dequantise
from phd_megatron.runtime import agreement

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedStateDict, StateDict
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.transformer.module import MegatronModule


def chunks(models: Sequence[torch.nn.Module]) -> list[tuple[str, MegatronModule]]:
    """(key in the state dict, bare model) of each chunk, named as Megatron-LM does."""
    bare = []
    for model in models:
        inner: MegatronModule = model
        while hasattr(inner, "module"):  # DistributedDataParallel, Float16Module
            inner = inner.module
        bare.append(inner)
    return [("model" if len(bare) == 1 else f"model{number}", model) for number, model in enumerate(bare)]


def content() -> dict[str, str | bool]:
    """How the state is sharded; Megatron-core asks for it when saving, and it is saved for the load."""
    return {
        # the only type of megatron-core 0.16 that loads under other TP and PP sizes
        "distrib_optim_sharding_type": "fully_reshardable",
        # layers of a HybridNorm* model differ, so they cannot be stacked into one tensor
        "non_homogeneous_layers": True,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def sharded_state(
    models: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler | None,
    *,
    is_loading: bool,
) -> ShardedStateDict:
    """Megatron-core's sharded state dict of this rank; collective. Its tensors are the live ones, not copies.

    Args:
        is_loading: the dict will be filled from a checkpoint, so optimizer states that do not exist yet are made.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {**content(), "dp_cp_group": group}
    state = {key: model.sharded_state_dict(metadata=metadata) for key, model in chunks(models)}
    if optimizer is not None:
        # given the models' dict alone: the optimizer's tensors are named after the parameters in it
        state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=metadata)
    dequantise({key: state[key] for key, _ in chunks(models)})  # the optimizer has found its parameters by then
    if scheduler is not None:
        state["opt_param_scheduler"] = scheduler.state_dict()
    return state


def rng_object(state: StateDict | None) -> ShardedObject:
    """This rank's random-number state under a name that holds its place in the layout."""
    data = parallel_state.get_data_parallel_group(with_context_parallel=True)
    sizes = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
        data.size(),
    )
    place = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        data.rank(),
    )
    return ShardedObject("rng_state", state, sizes, place)


def layout(optimizer: MegatronOptimizer | None) -> dict[str, int | bool | None]:
    """Facts about the layout for ``training_state.json``."""
    return {
        "world_size": agreement.world_size(),
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "use_distributed_optimizer": None if optimizer is None else optimizer.config.use_distributed_optimizer,
    }


@contextmanager
def whole_parameters(models: Sequence[MegatronModule]) -> Iterator[None]:
    """With overlapped parameter gathering the updated shards only arrive in the next forward pass; fetch them now."""
    overlapping = [model for model in models if getattr(model, "remove_forward_pre_hook_handles", None)]
    for model in overlapping:
        model.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for model in overlapping:
            model.enable_forward_pre_hook()
