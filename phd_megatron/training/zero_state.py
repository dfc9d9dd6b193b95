"""What ZeRO divides, put together for a moment: to be saved, filled from a checkpoint, or looked at.

A checkpoint of a run with DeepSpeed is one of Megatron-Core's plain optimizer. So that it is, the model's parameters
become whole ones on the host, with an AdamW of Megatron-Core's around them that holds main parameters and moments; it
never takes a step. The first rank of a data-parallel group has the values, the others shapes alone when it is saved; to
load, each reads all, and keeps its part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from torch import Tensor, nn

from phd_megatron.config.schema import RunConfig
from phd_megatron.training.optimizer import optimizer_options

Parameter: TypeAlias = Any
"""A parameter with the attributes that DeepSpeed and Megatron-Core put on it."""
Group: TypeAlias = "dict[str, Any]"
"""Options of parameters that are treated alike, and ``params``."""
MOMENTS = ("exp_avg", "exp_avg_sq")


class Partitions:
    """The parameters of a model as DeepSpeed divides them.

    Args:
        model: bare.
        zero: DeepSpeed's optimizer of it; states of AdamW are made here, since it makes them in its first step.
        group: ranks that share.
    """

    def __init__(self, model: nn.Module, zero: Any, group: dist.ProcessGroup) -> None:
        self.model, self.group = model, group
        self.parameters: list[Parameter] = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._pieces: list[Tensor] = next(
            list(getattr(zero, name))
            for name in (
                "fp32_partitioned_groups_flat",  # ZeRO-3
                "single_partition_of_fp32_groups",  # ZeRO-1 and 2
                "fp32_groups_flat_partition",  # ZeRO-1 in bfloat16 with float32 gradients
            )
            if hasattr(zero, name)
        )
        self._states = zero.optimizer.state
        for piece in self._pieces:
            self._states[piece] = _new_state(piece, zero.optimizer)
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
            zero._lazy_init_hp_params_optimizer_state()

    @property
    def steps(self) -> int:
        """Taken so far."""
        return max((int(self._states[piece]["step"]) for piece in self._pieces), default=0)

    @steps.setter
    def steps(self, count: int) -> None:
        for piece in self._pieces:
            step = self._states[piece]["step"]
            if isinstance(step, Tensor):
                step.fill_(count)
            else:
                self._states[piece]["step"] = count

    def main(self, parameter: Parameter) -> Tensor:
        """The whole main parameter, float32; collective."""
        from deepspeed.utils import safe_get_full_fp32_param

        value: Tensor = safe_get_full_fp32_param(parameter)
        return value.view(shape_of(parameter))

    def moment(self, parameter: Parameter, name: str) -> Tensor:
        """A whole moment, float32; collective."""
        from deepspeed.utils import safe_get_full_optimizer_state

        value: Tensor = safe_get_full_optimizer_state(parameter, name)
        return value.view(shape_of(parameter))

    def set(self, parameter: Parameter, data: Tensor, main: Tensor, moments: Sequence[Tensor]) -> None:
        """Put whole values back, of which each rank keeps its part.

        Args:
            data: in the type of the parameter.
        """
        from deepspeed import utils

        if not hasattr(parameter, "ds_id"):
            parameter.data.copy_(data)
            utils.safe_set_full_fp32_param(parameter, main)
            for name, moment in zip(MOMENTS, moments, strict=True):
                utils.safe_set_full_optimizer_state(parameter, moment, name)
            return
        if parameter.data.numel() == data.numel():  # small ones stay whole between steps
            parameter.data.copy_(data)
        parameter.ds_tensor.data.copy_(self._part(data, parameter))
        utils.safe_set_local_fp32_param(parameter, self._part(main, parameter))
        for name, moment in zip(MOMENTS, moments, strict=True):
            utils.safe_set_local_optimizer_state(parameter, self._part(moment, parameter), name)

    def _part(self, whole: Tensor, parameter: Parameter) -> Tensor:
        """This rank's part of it, flat; the last one's is filled up with zeros."""
        size = parameter.ds_tensor.numel()
        part = torch.zeros(size, dtype=whole.dtype)
        mine = whole.reshape(-1)[self.group.rank() * size :][:size]
        part[: mine.numel()].copy_(mine)
        return part

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """Inside, ``main_grad`` is the whole gradient, and parameters have shapes and no values."""
        from deepspeed.utils import safe_get_full_grad

        parameter: Parameter
        for parameter in self.parameters:
            parameter.main_grad = safe_get_full_grad(parameter).float().view(shape_of(parameter))
        try:
            with self.replaced(lambda parameter: torch.empty(shape_of(parameter), dtype=parameter.dtype)):
                yield
        finally:
            for parameter in self.parameters:
                del parameter.main_grad

    @contextmanager
    def replaced(self, value_of: Callable[[Parameter], Tensor]) -> Iterator[None]:
        """Inside, parameters have other values; collective where these are."""
        values = [value_of(parameter) for parameter in self.parameters]
        own = [parameter.data for parameter in self.parameters]
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data = value
        try:
            yield
        finally:
            for parameter, value in zip(self.parameters, own, strict=True):
                parameter.data = value


def shape_of(parameter: Parameter) -> torch.Size:
    """Of the whole parameter, also where ZeRO-3 has divided it."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _new_state(piece: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What the optimizer would make in its first step."""
    counted_there = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    place = piece.device if counted_there else torch.device("cpu")
    is_torch = isinstance(optimizer, torch.optim.AdamW)
    step = torch.zeros((), dtype=torch.float32, device=place) if is_torch else 0
    return {"step": step, **{name: torch.zeros_like(piece) for name in MOMENTS}}


@contextmanager
def on_the_host(
    partitions: Partitions, groups: Sequence[Group], optimizer: torch.optim.Optimizer, run: RunConfig, *, loading: bool
) -> Iterator[MegatronOptimizer]:
    """Inside, the model's parameters are whole and on the host, and so is an optimizer of Megatron-Core's around them.

    Args:
        groups: Megatron-Core's, of the model's parameters.
        optimizer: of the pieces; its groups have the rates of now.
        loading: what is inside at the end is kept.
    """
    parameters = partitions.parameters
    has_values = loading or partitions.group.rank() == 0

    def host(whole: Tensor) -> Tensor:
        return whole.cpu() if has_values else torch.zeros((), dtype=whole.dtype).expand(whole.shape)

    mains = {id(parameter): host(partitions.main(parameter)) for parameter in parameters}
    # Before parameters are on the host: where one is, DeepSpeed collects what belongs to it.
    moments = {
        id(parameter): {name: host(partitions.moment(parameter, name)) for name in MOMENTS} for parameter in parameters
    }
    with partitions.replaced(lambda parameter: mains[id(parameter)].to(parameter.dtype)):
        step = torch.tensor(float(partitions.steps))
        held, states = {}, {}
        for parameter in parameters:
            main = nn.Parameter(mains[id(parameter)]) if run.training.bf16 else parameter
            held[id(parameter)], states[main] = main, {"step": step.clone(), **moments[id(parameter)]}
        whole = _megatron_optimizer(groups, optimizer.param_groups, held, states, run)
        yield whole
        data = [parameter.data for parameter in parameters]
    if not loading:
        return
    found = {main: state for part in _parts(whole) for main, state in part.optimizer.state.items()}
    for parameter, value in zip(parameters, data, strict=True):
        main = held[id(parameter)]
        state = found[main]
        partitions.set(parameter, value, value if main is parameter else main.data, [state[name] for name in MOMENTS])
    partitions.steps = max(int(state["step"]) for state in found.values())


def _megatron_optimizer(
    groups: Sequence[Group],
    now: Sequence[Group],
    held: Mapping[int, Parameter],
    states: Mapping[Parameter, dict[str, Tensor]],
    run: RunConfig,
) -> MegatronOptimizer:
    """Around the model's parameters as they are now; as Megatron-Core's, with an optimizer of their own for experts.

    Args:
        now: groups with the options of the last step.
        held: main parameters, by the identity of the model's.
        states: of these.
    """
    options, current = optimizer_options(run), {_kind(group): group for group in now}
    parts: list[MegatronOptimizer] = []
    for of_experts in (False, True):
        mine = [group for group in groups if group["is_expert_parallel"] == of_experts]
        if not mine:
            continue
        mains = [[held[id(parameter)] for parameter in group["params"]] for group in mine]
        inner = torch.optim.AdamW(
            [
                {**current.get(_kind(group), {}), **group, "params": params}
                for group, params in zip(mine, mains, strict=True)
            ],
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_eps,
        )
        inner.state.update({main: states[main] for params in mains for main in params})
        if run.training.bf16:
            parts.append(_HostOptimizer(inner, options, [group["params"] for group in mine], mains))
        else:
            parts.append(FP32Optimizer(inner, options, _nothing))
    return parts[0] if len(parts) == 1 else ChainedOptimizer(parts)


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    chained: list[MegatronOptimizer] = getattr(optimizer, "chained_optimizers", [optimizer])
    return chained


def _kind(group: Group) -> tuple[Any, ...]:
    return tuple(group[name] for name in ("max_lr", "min_lr", "wd_mult", "is_expert_parallel"))


def _nothing(optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> None:
    """States are there."""


class _HostOptimizer(Float16OptimizerWithFloat16Params):
    """Megatron-Core's optimizer for bfloat16 around main parameters that are there; it would want them on a GPU."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: OptimizerConfig,
        parameters: list[list[Parameter]],
        mains: list[list[Parameter]],
    ) -> None:
        super().__init__(None, config, None, _nothing)
        self.optimizer = optimizer
        self.float16_groups, self.fp32_from_float16_groups = parameters, mains
        self.fp32_from_fp32_groups: list[list[Parameter]] = [[] for _ in parameters]
        self.is_stub_optimizer = False
