"""An export's tensors into vLLM's layers, which have some of them side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor, nn
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.model_executor.parameter import BasevLLMParameter

#: a projection of an export to the layer that may have it, and its place there
STACKED: dict[str, tuple[str, str | int]] = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


def load(model: nn.Module, weights: Iterable[tuple[str, Tensor]], tied: bool, num_experts: int) -> set[str]:
    """Set all parameters.

    Raises:
        ValueError: for a tensor that the model has no place for, or a parameter that tensors set in part or not at all.
    """
    parameters, done = dict(model.named_parameters()), set()
    given: Counter[str] = Counter()  # tensors by the parameter, or the experts, that they are parts of
    for name, tensor in weights:
        if tied and name == "lm_head.weight":
            continue
        layer, of_expert, rest = name.partition(".experts.")
        if of_expert:
            experts: MoERunner = model.get_submodule(f"{layer}.experts")
            prefix = f"{layer}.experts."
            if not list(experts.load_weights([(rest, tensor)])):
                raise ValueError(f"the export has a tensor {name}, which no expert has a place for; export it again")
            given[prefix] += 1
            done |= {key for key in parameters if key.startswith(prefix)}
            continue
        owner, _, kind = name.rpartition(".")
        module, _, projection = owner.rpartition(".")
        stacked, place = STACKED.get(projection, ("", ""))
        target = f"{module}.{stacked}.{kind}"
        if target in parameters:
            sharded: BasevLLMParameter = parameters[target]
            sharded.weight_loader(sharded, tensor, place)
            given[target] += 1
        elif name in parameters:
            target, parameter = name, parameters[name]
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)
        else:
            raise ValueError(f"the export has a tensor {name}, which its config.json has no place for; export it again")
        done.add(target)
    for name, count in given.items():
        parts = sum(f".{stacked}." in name for stacked, _ in STACKED.values())
        if count != (wanted := parts or 3 * num_experts):
            raise ValueError(f"the export has {count} of the {wanted} tensors that make {name}; export it again")
    if missing := sorted(set(parameters) - done):
        raise ValueError(f"the export has no tensors for {', '.join(missing[:5])}; export it again")
    return done
