"""Defects of megatron-core that are not about the device, corrected from outside.

:func:`install` is called on every device. The optimizer rows matter wherever neither Transformer Engine nor apex is
installed, because megatron then falls back to torch's AdamW, whose state has a ``step`` per parameter.
"""

from __future__ import annotations

import functools
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from phd_megatron.runtime.redirects import Redirect, activate, put

if TYPE_CHECKING:
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedStateDict, StateDict
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
    from torch.optim.optimizer import ParamsT

    Group = dict[str, float | bool | str | list[int] | None]

#: what Megatron says on every start and nobody can act on; `phd-megatron doctor` says the useful part better
_NOISE = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    r"`torch\.distributed\.\w+` is deprecated",  # torch 2.13 renames all_gather_into_tensor, reduce_scatter_tensor
    r"\w+ is experimental and still under active development",  # of models that are imported beside ours
)
#: the same by ``logging``: module, and how the line begins
_LOGGED_NOISE = (
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    ("megatron.core.dist_checkpointing.strategies.common", "load_common is deprecated"),
    ("megatron.core.transformer.transformer_layer", "Rewrapping ModuleSpec"),
    ("torch.utils.cpp_extension", "No CUDA runtime is found"),  # of a CUDA build of torch on a machine without one
    ("megatron.core.distributed.distributed_data_parallel", "DistributedDataParallel: full_param_layout not provided"),
)


def install() -> None:
    """Correct the defects in every megatron module imported so far and from now on. May be called again."""
    _quiet()
    activate(REDIRECTS)


def _quiet() -> None:
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    for name, begin in _LOGGED_NOISE:
        logging.getLogger(name).addFilter(_Without(begin))


@dataclass(frozen=True)
class _Without:
    """A filter of ``logging`` for lines that begin so; equal ones are added once."""

    begin: str

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.begin)


def torch_adamw() -> type:
    """AdamW for megatron's fallback: one fused kernel, and state that megatron's checkpoints can save and load.

    Fused is about seven times faster on CPU than the default loop over parameters. The state is made when it is first
    asked for, with ``step`` 0, because megatron saves and loads optimizers that have not stepped yet; after loading
    every parameter gets its own ``step``, because megatron hands one tensor to all, which would then count each
    parameter's update.
    """
    import torch

    class FusedAdamW(torch.optim.AdamW):
        def __init__(self, params: ParamsT, **kwargs: Any) -> None:
            super().__init__(params, **{"fused": True, **kwargs})

        @torch.no_grad()
        def _make_state(self) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    state = self.state[parameter]
                    if "step" not in state:
                        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    for key in ("exp_avg", "exp_avg_sq"):
                        if key not in state:
                            state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)

        def state_dict(self) -> StateDict:
            self._make_state()
            saved = super().state_dict()
            if not self.state:
                # A pipeline stage without experts holds an optimizer without parameters. Megatron asks it for its step
                # all the same; on loading, checkpoint/adam_state.py takes the step of the optimizers beside it.
                saved["state"] = {0: {"step": torch.zeros(())}}
            return saved

        def load_state_dict(self, state_dict: StateDict) -> None:
            if not any(group["params"] for group in self.param_groups):
                state_dict = {**state_dict, "state": {}}
            super().load_state_dict(state_dict)
            for state in self.state.values():
                if "step" in state:
                    state["step"] = state["step"].clone()

    return FusedAdamW


def _torch_adamw(module: ModuleType) -> None:
    if not module.USING_PYTORCH_OPTIMIZER:
        return
    # The function that builds the optimizer says torch.optim.AdamW, so this module gets a torch with another AdamW.
    outer = module.torch
    names = ModuleType("torch")
    names.__dict__.update(outer.__dict__)
    names.__dict__["__getattr__"] = lambda name: getattr(outer, name)
    names.__dict__["optim"] = SimpleNamespace(**{**vars(outer.optim), "AdamW": torch_adamw()})
    put(module, torch=names)


def _adam_state_without_step(module: ModuleType) -> None:
    import torch

    optimizer = module.DistributedOptimizer
    original = optimizer._set_main_param_and_optimizer_states

    @functools.wraps(original)
    @torch.no_grad()  # a shard of an fp32 parameter is a view of a leaf, which autograd refuses to write into
    def set_states(
        self: DistributedOptimizer, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]
    ) -> None:
        if not self.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
            group, order = self.model_param_group_index_map[model_param]
            state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
            # The step was loaded before, with the parameter groups. fully_reshardable brings none, and dp_reshardable
            # brings the one from before loading.
            if "step" in state:
                tensors = {**tensors, "step": state["step"]}
        original(self, model_param, tensors)

    put(optimizer, _set_main_param_and_optimizer_states=set_states)


def _padded_buckets(module: ModuleType) -> None:
    optimizer = module.DistributedOptimizer
    original = optimizer.sharded_param_state_fully_reshardable

    def with_padding(self: DistributedOptimizer, state: StateDict | None) -> StateDict | None:
        for index, buffer in enumerate(self.buffers):
            for tensors in state[index].values() if state else ():
                for key, compact in tensors.items():
                    if key == "numel_unpadded" or compact.numel() == buffer.numel:
                        continue
                    padded = compact.new_zeros(buffer.numel)
                    taken = 0
                    for (start, _), bucket in zip(buffer.bucket_indices, buffer.buckets, strict=True):
                        count = bucket.numel_unpadded
                        padded[start : start + count] = compact[taken : taken + count]
                        taken += count
                    tensors[key] = padded
        return state

    @functools.wraps(original)
    def sharded(self: DistributedOptimizer, *args: Any, **kwargs: Any) -> ShardedStateDict:
        gather = self.get_parameter_state_dp_zero
        self.get_parameter_state_dp_zero = lambda *a, **k: with_padding(self, gather(*a, **k))
        try:
            return original(self, *args, **kwargs)
        finally:
            del self.get_parameter_state_dp_zero

    put(optimizer, sharded_param_state_fully_reshardable=sharded)


def _groups_of_one_kind(module: ModuleType) -> None:
    original = module.MegatronOptimizer._filter_and_reorder_param_groups

    def kinds(groups: list[Group]) -> list[tuple[float | str | list[int] | None, ...]]:
        names = module.param_group_identifier_keys
        return [tuple(group.get(name, group.get(f"pre_{name}")) for name in names) for group in groups]

    @functools.wraps(original)
    def reorder(current_groups: list[Group], state_dict_groups: list[Group]) -> list[Group]:
        if kinds(current_groups) == kinds(state_dict_groups):
            return state_dict_groups
        reordered: list[Group] = original(current_groups, state_dict_groups)
        return reordered

    put(module.MegatronOptimizer, _filter_and_reorder_param_groups=staticmethod(reorder))


def _checkpoint_without_output(module: ModuleType) -> None:
    original = module.CheckpointWithoutOutput.__init__

    @functools.wraps(original)
    def __init__(self: CheckpointWithoutOutput, fp8: bool = False) -> None:
        original(self, fp8)
        self.fp8 = bool(fp8)

    put(module.CheckpointWithoutOutput, __init__=__init__)


def _te_general_gemm(module: ModuleType) -> None:
    if "te_general_gemm" not in vars(module):
        vars(module)["te_general_gemm"] = None


def _put_local(module: ModuleType, name: str, replacement: Callable[..., Any]) -> None:
    """Another value for a name of ``module``, and for what optimizer modules took from there when they were imported.

    They are imported first where a command reads the fields of Megatron-Core's configurations before it knows the
    device.
    """
    before = getattr(module, name)
    put(module, **{name: replacement})
    for taker in ("clip_grads", "optimizer"):
        names = vars(sys.modules.get(f"megatron.core.optimizer.{taker}", ModuleType(taker)))
        names.update({key: replacement for key, value in names.items() if value is before})


def _scale_in_place(module: ModuleType) -> None:
    import torch

    def scale_all(
        chunk_size: int, noop_flag: torch.Tensor, tensor_lists: list[list[torch.Tensor]], scale: float | torch.Tensor
    ) -> None:
        for source, target in zip(*tensor_lists, strict=True):
            torch.mul(source, scale, out=target)

    _put_local(module, "local_multi_tensor_scale", scale_all)


def _norm_on_device(module: ModuleType) -> None:
    import torch

    def norm_of_all(
        chunk_size: int,
        noop_flag: torch.Tensor,
        tensor_lists: list[list[torch.Tensor]],
        per_tensor: bool,
        *args: bool,
    ) -> tuple[torch.Tensor, None]:
        norms = [norm.float() for tensors in tensor_lists for norm in torch._foreach_norm(tensors)]
        return torch.linalg.vector_norm(torch.stack(norms)).reshape(1), None

    _put_local(module, "local_multi_tensor_l2_norm", norm_of_all)


def _weight_gradient(module: ModuleType) -> None:
    if not module._grad_accum_fusion_available:
        from phd_megatron.runtime import weight_gradient

        module._grad_accum_fusion_available = True  # type: ignore[attr-defined]
        module.fused_weight_gradient_mlp_cuda = weight_gradient  # type: ignore[attr-defined]


REDIRECTS = (
    Redirect(
        "torch-adamw",
        ("megatron.core.optimizer",),
        _torch_adamw,
        "torch's AdamW has no state before its first step, shares one step tensor after loading, and is slow unfused",
    ),
    Redirect(
        "adam-state-without-step",
        ("megatron.core.optimizer.distrib_optimizer",),
        _adam_state_without_step,
        "loading sharded states lacks 'step' or sets it back to 0, and writes into a leaf",
    ),
    Redirect(
        "padded-buckets",
        ("megatron.core.optimizer.distrib_optimizer",),
        _padded_buckets,
        "fully_reshardable cuts parameters out of gathered buckets at offsets that count the padding it has dropped: "
        "states of all buckets but the first are saved shifted (ddp_bucket_size; tied embeddings with pipelines)",
    ),
    Redirect(
        "groups-of-one-kind",
        ("megatron.core.optimizer.optimizer",),
        _groups_of_one_kind,
        "a plain optimizer takes two groups for one that differ in their rates alone, and loads neither (decoupled_lr)",
    ),
    Redirect(
        "checkpoint-without-output",
        ("megatron.core.tensor_parallel.random",),
        _checkpoint_without_output,
        "fp8=False is taken for fp8, which needs Transformer Engine (recompute of the norms)",
    ),
    Redirect(
        "te-general-gemm",
        ("megatron.core.transformer.moe.moe_utils",),
        _te_general_gemm,
        "the router's name for Transformer Engine's GEMM is unbound without it",
        until="0.17",
    ),
    Redirect(
        "scale-in-place",
        ("megatron.core.utils",),
        _scale_in_place,
        "clipping without Transformer Engine and apex makes a second copy of every gradient",
    ),
    Redirect(
        "norm-on-device",
        ("megatron.core.utils",),
        _norm_on_device,
        "the gradient norm without Transformer Engine and apex waits for the GPU once for every parameter",
    ),
    Redirect(
        "weight-gradient",
        ("megatron.core.tensor_parallel.layers",),
        _weight_gradient,
        "gradient_accumulation_fusion knows apex's extension alone, and torch has the operators",
    ),
)
