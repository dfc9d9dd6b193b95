"""Optimizer states that move between the distributed optimizer and the plain one, and between weight-decay groups.

Both save the moments of a parameter under the same name and with its shape, but Megatron-Core loads only what the same
kind saved: main parameters have two names (``param`` and ``fp32_param``), the plain optimizer of an fp32 model saves
none since they are the model's own, and the parameter groups lie at two depths. The groups themselves are those of this
run: another ``decay_norms`` or ``decay_embeddings`` than the checkpoint's makes more, or fewer, or others.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import TYPE_CHECKING, TypeAlias

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.optimizer import param_group_identifier_keys
from megatron.core.optimizer.optimizer import FP32Optimizer

from phd_megatron.config.plain import Plain

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedStateDict, StateDict
    from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer

Group: TypeAlias = "dict[str, float | bool | str | list[int] | None]"
"""Parameters that are treated alike: options by name, and ``params``."""

_NAMES = ("optimizer.state.param.", "optimizer.state.fp32_param.")
_OF_MEGATRON, _MAIN = "fp32_from_fp16_params", "main_params_by_group"


def ask(state: ShardedStateDict, optimizer: MegatronOptimizer | ChainedOptimizer, stored: Container[str]) -> None:
    """Before a load: ask for main parameters under the name that the checkpoint has, in place.

    The numbers of the parameters in the groups of a plain optimizer are left out: Megatron-Core would merge them into
    the checkpoint's groups one by one. Its main parameters are asked for by the number of their group: in a list, the
    load drops the empty groups of a pipeline stage, and merges with those of rank 0. ``adapt`` puts both back.

    Args:
        state: sharded state dict of ``optimizer``, a Megatron optimizer.
        stored: names in the checkpoint.
    """
    for entry in nested_values(state):
        for name, other in (_NAMES, _NAMES[::-1]):
            key = getattr(entry, "key", "")
            if key.startswith(name) and key not in stored and key.replace(name, other) in stored:
                entry.key = key.replace(name, other)
                break
    for part, its_state in _parts(optimizer, state):
        for number, parameter in enumerate(_parameters(part)):
            tensors = its_state["param_state"][number]
            main = tensors.get("param")
            if main is not None and parameter.dtype == torch.float32 and main.key not in stored:
                del tensors["param"]  # `adapt` takes it from the model
        if not part.config.use_distributed_optimizer and part.optimizer is not None:
            holder = its_state if isinstance(part, FP32Optimizer) else its_state["optimizer"]
            for group in holder["param_groups"]:
                del group["params"]
            if _OF_MEGATRON in its_state:
                its_state[_MAIN] = dict(enumerate(its_state.pop(_OF_MEGATRON)))


def adapt(loaded: StateDict, optimizer: MegatronOptimizer | ChainedOptimizer) -> None:
    """After the load, and after the model's: bring the states into the form of ``optimizer``'s kind, in place."""
    for part, saved in _parts(optimizer, loaded):
        if part.optimizer is None:
            continue
        inner = saved.get("optimizer")
        if part.config.use_distributed_optimizer:
            if "param_groups" in saved:
                saved["optimizer"] = {name: saved.pop(name) for name in ("param_groups", "state")}
            saved.setdefault("param_state_sharding_type", "fully_reshardable")
            for number, parameter in enumerate(_parameters(part)):
                tensors = saved["param_state"][number]
                if not any(name in tensors for name in ("param", "fp32_param")):
                    tensors["param"] = parameter.detach()
            holder = saved["optimizer"]
        elif isinstance(part, FP32Optimizer):
            if isinstance(inner, dict):
                saved["param_groups"] = saved.pop("optimizer")["param_groups"]
            holder = saved
        else:
            holder = saved["optimizer"]
            main = saved.pop(_MAIN, {})
            saved[_OF_MEGATRON] = [main.get(number, []) for number in range(len(part.fp32_from_float16_groups))]
        holder.setdefault("state", {})  # loading drops the empty one of a stage without any of its parameters
        holder["param_groups"] = _groups_of_this_run(part.optimizer, holder["param_groups"])


def _groups_of_this_run(optimizer: torch.optim.Optimizer, saved: list[Group]) -> list[Group]:
    """A saved group for each group of ``optimizer``; another one where the checkpoint has none of its kind.

    What then differs, such as the decay, is the configuration's and is set after the load.
    """
    by_kind = {_kind(group): group for group in saved}
    return [
        {**by_kind.get(_kind(group), saved[0]), **_identity(group), "params": group["params"]}
        for group in optimizer.state_dict()["param_groups"]
    ]


def _identity(group: Group) -> Group:
    """What Megatron-Core tells groups apart by, as far as a group says it; NeMo writes other names."""
    said = {name: name if name in group else f"pre_{name}" for name in param_group_identifier_keys}
    return {name: group[key] for name, key in said.items() if key in group}


def _kind(group: Group) -> tuple[Plain, ...]:
    identity = _identity(group)
    return tuple(identity.get(name) for name in param_group_identifier_keys)


def _parts(
    optimizer: MegatronOptimizer | ChainedOptimizer, state: StateDict
) -> Iterator[tuple[MegatronOptimizer, StateDict]]:
    """(optimizer, its part of the state) of a chain; Megatron-Core numbers the parts when there are several."""
    chain = getattr(optimizer, "chained_optimizers", [optimizer])
    for number, part in enumerate(chain):
        yield part, state if len(chain) == 1 else state[number]


def _parameters(part: MegatronOptimizer) -> Iterator[torch.nn.Parameter]:
    """Model parameters of a distributed optimizer in the order of its ``param_state``; none of a plain one."""
    if part.config.use_distributed_optimizer:
        for buffer in part.buffers:
            yield from buffer.param_index_map
