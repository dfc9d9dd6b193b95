"""DeepSpeed's engine: ZeRO-1, 2 and 3, with states and parameters on the host where its file says so.

Its numbers are those of Megatron-Core's engine. Three things make them so, which DeepSpeed cannot know:

- it averages gradients over data-parallel ranks, and here each token of the global batch counts the same: the loss of a
  micro-batch is its sum over tokens, times the number of ranks, divided by the tokens of all;
- parameters that every tensor-parallel rank has, and computes a part of the gradient of, get the sum of the parts by a
  hook (:func:`sum_over_tensor_ranks`); without it nothing fails and every number is a little wrong;
- which parameters decay and which rate they have is Megatron-Core's rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor, nn

from phd_megatron.config.deepspeed import deepspeed_settings
from phd_megatron.config.schema import RunConfig
from phd_megatron.model.gpt_model import PHDGPTModel
from phd_megatron.runtime import agreement
from phd_megatron.runtime.deepspeed import load_deepspeed, require_deepspeed
from phd_megatron.training.micro_batch import MicroBatches, run_schedule
from phd_megatron.training.optimizer import in_run_precision, let_go, parameter_groups
from phd_megatron.training.zero_state import Partitions, on_the_host

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer


class ZeroChunk(nn.Module):
    """The model as schedules and observers see one: Megatron-Core's DDP by its attributes, DeepSpeed's engine inside.

    Args:
        module: what DeepSpeed wraps.
    """

    def __init__(self, module: MegatronModule, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.module, self.config = module, module.config
        self.ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=False)
        places = {parameter: (0, parameter.numel(), 0) for parameter in module.parameters()}
        # As in Megatron-Core's DDP, where these are no longer the method of that name.
        self.buffers = [SimpleNamespace(data_parallel_group=group, param_index_map=places)]  # type: ignore[assignment]
        self.expert_parallel_buffers: list[Any] = []
        self.engine: list[Any] = []  # in a list: an engine is a module, which would be registered

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Of the model, with its parameters fetched where they are divided."""
        output: Tensor = self.engine[0](*args, **kwargs)
        return output


class ZeroEngine:
    """See :class:`~phd_megatron.training.engine.Engine`.

    Args:
        model: the one chunk of this rank.
        run: resolved.
        device: of this rank.

    Raises:
        UserError: DeepSpeed is not installed.
    """

    def __init__(self, model: PHDGPTModel, run: RunConfig, device: torch.device) -> None:
        require_deepspeed(run)
        deepspeed = load_deepspeed(on_cpu=device.type == "cpu")
        self._group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self._run, self._has_experts = run, run.model.transformer.get("num_moe_experts") is not None
        (module,) = in_run_precision([model], run)
        sum_over_tensor_ranks(model, parallel_state.get_tensor_model_parallel_group())
        self._chunk = ZeroChunk(module, self._group)
        self.models: Sequence[MegatronModule] = [self._chunk]
        # The first rank's file is every rank's, should they see different ones.
        settings = agreement.from_rank_zero(lambda: deepspeed_settings(run, self._group.size()))
        self._groups = parameter_groups([model], run)
        for parameter in model.parameters():
            # Megatron-Core's mark of experts, and DeepSpeed's of experts that other ranks do not have.
            if hasattr(parameter, "allreduce"):
                parameter.allreduce = True
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=module,
            optimizer=_adamw(deepspeed, self._groups, run, settings),
            config=settings,
            mpu=_Layout(),
            dist_init_required=False,
        )
        self._chunk.engine.append(self._engine)
        self._partitions = Partitions(model, self._zero, self._group)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """torch's or DeepSpeed's AdamW, of flat pieces."""
        inner: torch.optim.Optimizer = self._zero.optimizer
        return inner

    def forward_backward(self, step: MicroBatches, watched: bool) -> list[Tensor]:
        """Reports of the micro-batches, one after the other."""
        self._chunk.train()
        # The first backward pass needs the tokens of the last micro-batch, so all are read before.
        batches = [next(step.batches) for _ in range(step.count)]
        scale = self._group.size() / self._tokens(batches, step.device)
        if self._has_experts:
            MoEAuxLossAutoScaler.set_loss_scale(scale.view(1))  # [1], as the schedules give it
        reports = []
        for number, batch in enumerate(batches, 1):
            self._engine.set_gradient_accumulation_boundary(number == len(batches))
            output, loss_of = step.forward_step(iter([batch]), self._chunk)
            loss, _, report = loss_of(output)
            self._engine.backward(loss * scale, scale_wrt_gas=False)
            reports.append(report)
        return reports

    def _tokens(self, batches: Sequence[dict[str, Tensor]], device: torch.device) -> Tensor:
        """``[]`` float32: those of the global batch that carry loss, at least one."""
        tokens = torch.stack([batch["loss_mask"].sum() for batch in batches]).sum().to(device, torch.float64)
        dist.all_reduce(tokens, group=self._group)
        return tokens.clamp(min=1).float()

    def update(self) -> tuple[bool, float]:
        """Clip and take the step, unless a gradient is not finite."""
        self._engine.step()
        taken = not getattr(self._zero, "overflow", False)
        if taken and not self._run.optimizer.clip_grad:
            return True, 0.0  # as Megatron-Core, which takes no norm then
        return taken, float(self._engine.get_global_grad_norm())

    def forward(self, step: MicroBatches) -> list[Tensor]:
        """Reports of micro-batches."""
        return run_schedule(self.models, step, forward_only=True)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model fetches its parameters itself."""
        self._chunk.eval()
        yield
        self._chunk.train()

    @contextmanager
    def final_gradients(self) -> Iterator[Sequence[MegatronModule]]:
        """Whole gradients, and parameters that have their shapes and no values."""
        with self._partitions.gradients():
            yield self.models

    @contextmanager
    def state(self, *, loading: bool) -> Iterator[tuple[Sequence[MegatronModule], MegatronOptimizer]]:
        """Whole parameters, main parameters and moments on the host, as Megatron-Core's plain optimizer has them."""
        with on_the_host(self._partitions, self._groups, self.optimizer, self._run, loading=loading) as whole:
            yield self.models, whole

    def loss_scale(self) -> float:
        """Gradients are those of the mean."""
        return 1.0

    def let_go(self) -> None:
        """Free what DeepSpeed and the wrappers hold."""
        self._engine.destroy()
        self._chunk.engine.clear()
        let_go([self._chunk])


def _adamw(
    deepspeed: Any, groups: list[dict[str, Any]], run: RunConfig, settings: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """The optimizer of the pieces: torch's fused one, wherever they are, or DeepSpeed's for the host if asked for."""
    options, host = run.optimizer, settings["zero_optimization"].get("offload_optimizer") or {}
    # Copies: the optimizer writes into its groups, and DeepSpeed puts flat pieces in the place of parameters.
    groups = [{**group, "params": list(group["params"])} for group in groups if group["params"]]
    common: dict[str, Any] = {
        "lr": options.lr,
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_eps,
    }
    if settings["zero_force_ds_cpu_optimizer"] and host.get("device") == "cpu":
        built: torch.optim.Optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(
            groups, weight_decay=options.weight_decay, adamw_mode=True, **common
        )
        return built
    return torch.optim.AdamW(groups, weight_decay=options.weight_decay, fused=True, **common)


def sum_over_tensor_ranks(model: MegatronModule, group: dist.ProcessGroup) -> None:
    """Hooks that make the gradients of parameters which all tensor-parallel ranks have those of the whole.

    The rule is that of Megatron-Core's ``finalize_model_grads`` and of :mod:`phd_megatron.model.gradients`.
    """
    if group.size() == 1:
        return
    for parameter in model.parameters():
        averaged = getattr(parameter, "average_gradients_across_tp_domain", False)
        in_parts = model.config.sequence_parallel and getattr(parameter, "sequence_parallel", False)
        if averaged or in_parts or getattr(parameter, "sum_gradient_over_tensor_parallel", False):
            parts = group.size() if averaged else 1
            parameter.register_hook(lambda gradient, parts=parts: _summed(gradient, group) / parts)


def _summed(gradient: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = gradient.clone()
    dist.all_reduce(total, group=group)
    return total


class _Layout:
    """Megatron-Core's groups, by the names that DeepSpeed asks for; context-parallel ranks are data-parallel ones."""

    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    @staticmethod
    def get_data_parallel_group() -> dist.ProcessGroup:
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    @classmethod
    def get_data_parallel_world_size(cls) -> int:
        return cls.get_data_parallel_group().size()

    @classmethod
    def get_data_parallel_rank(cls) -> int:
        return cls.get_data_parallel_group().rank()

    @classmethod
    def get_data_parallel_group_ranks(cls) -> list[int]:
        return dist.get_process_group_ranks(cls.get_data_parallel_group())
