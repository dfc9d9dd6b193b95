"""Megatron-core on CPU and gloo: the one place that redirects what it hard-wires to CUDA.

:func:`install` is called by the runtime when the run's device is the CPU, with or without a CUDA-capable torch. Every
change is a row of :data:`REDIRECTS` with its reason, and each has a test that fails without it.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Collection
from types import ModuleType
from typing import TYPE_CHECKING

from phd_megatron.runtime.redirects import Redirect, activate, put, replace_literals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    import torch
    import torch.distributed as dist
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    from phd_megatron.runtime.cpu_backend.torch_names import Device, Stream

_installed = False


def install(skip: Collection[str] = ()) -> None:
    """Redirect megatron-core to the CPU, for this process and for good. A second call does nothing.

    Args:
        skip: names of redirects to leave out; the tests use it to show that each is needed.

    Call it before megatron is imported: functions that megatron compiles at import stay compiled otherwise.
    """
    global _installed
    if _installed:
        return
    _installed = True
    unknown = set(skip) - {redirect.name for redirect in REDIRECTS} - set(METHODS)
    if unknown:
        raise ValueError(f"skip={sorted(unknown)} names no redirect of the CPU backend")
    warnings.filterwarnings("ignore", message="When using .* CUDA_DEVICE_MAX_CONNECTIONS")
    if "tensor-cuda" not in skip:
        _tensor_cuda()
    if "record-stream" not in skip:
        _record_stream()
    if "cuda-packages" not in skip:
        _hide_cuda_packages()
    if "triton-kernels" not in skip:
        _replace_triton_kernels()
    activate(redirect for redirect in _table(skip) if redirect.name not in skip)


def _torch_names(skip: Collection[str]) -> Redirect:
    def apply(module: ModuleType) -> None:
        import torch

        if module.__dict__.get("torch") is torch:
            put(module, torch=names)

    from phd_megatron.runtime.cpu_backend.torch_names import make_torch

    names = make_torch(cuda_names="cuda-names" not in skip, device_literals="device-literals" not in skip)
    return Redirect("torch", ("megatron.*",), apply, "megatron's modules get the torch of torch_names.py")


def _table(skip: Collection[str]) -> list[Redirect]:
    return [_torch_names(skip), *(redirect for redirect in REDIRECTS if redirect.modules)]


def _tensor_cuda() -> None:
    import torch

    def cuda(self: torch.Tensor, *args: Device, **kwargs: Device) -> torch.Tensor:
        return self

    put(torch.Tensor, cuda=cuda)


def _record_stream() -> None:
    import torch

    def record_stream(self: torch.Tensor, stream: Stream) -> None:
        """Memory of the host is freed when nothing holds it."""

    put(torch.Tensor, record_stream=record_stream)


def _hide_cuda_packages() -> None:
    for name in ("transformer_engine", "apex", "amp_C"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def _replace_triton_kernels() -> None:
    """Where there is no triton, give the one module that asks for it unconditionally (from 0.18) without its kernels.

    They copy expert activations into a paged buffer on a GPU (``moe_paged_stash``), which no run on a CPU asks for.
    """
    if importlib.util.find_spec("triton") is None:
        name = "megatron.core.transformer.moe.ops.paged_stash"
        module = ModuleType(name, "Stands for Megatron's module, whose kernels need triton.")
        module.__dict__.update(GLOBAL_BLOCK_SIZE=1024, paged_stash_copy_kernel=None, paged_stash_pop_kernel=None)
        sys.modules.setdefault(name, module)


def _made_in_torch_names(module: ModuleType) -> None:
    """Nothing to do here: the names are part of the module that "torch" puts in place."""


def _jit_fuser(module: ModuleType) -> None:
    module.disable_jit_fuser()


def _rng(module: ModuleType) -> None:
    import contextlib

    from phd_megatron.runtime.cpu_backend import torch_names

    def get_state(device: Device = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch_names.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Device = None, graph_safe: bool = False) -> None:
        torch_names.set_rng_state(new_state)

    @contextlib.contextmanager
    def fork(self: CudaRNGStatesTracker, name: str = module._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        # Megatron's own warns whenever the CPU generator moves inside; here it is the one that must move.
        if name not in self.states_:
            raise KeyError(f"random-number state {name!r} was not added; added are {sorted(self.states_)}")
        outer_name, outer_state = self._current_state_name, get_state()
        if outer_name != "default-rng":
            self.states_[outer_name] = outer_state
        set_state(self.states_[name])
        self._current_state_name = name
        try:
            yield
        finally:
            self.states_[name] = get_state()
            set_state(outer_state)
            self._current_state_name = outer_name

    put(module, _get_cuda_rng_state=get_state, _set_cuda_rng_state=set_state)
    put(module.CudaRNGStatesTracker, fork=fork)


_TYPE_NAMES = {f"torch.cuda.{kind}Tensor": f"torch.{kind}Tensor" for kind in ("Float", "Half", "BFloat16")}


def _distrib_optimizer_types(module: ModuleType) -> None:
    replace_literals(module.DistributedOptimizer.__init__, _TYPE_NAMES)
    replace_literals(module.DistributedOptimizer._build_model_and_main_param_groups, _TYPE_NAMES)


def _float16_optimizer_types(module: ModuleType) -> None:
    replace_literals(module.Float16OptimizerWithFloat16Params.__init__, _TYPE_NAMES)


def _clip_grads_types(module: ModuleType) -> None:
    replace_literals(module.clip_grad_by_total_norm_fp32, _TYPE_NAMES)


def _p2p(module: ModuleType) -> None:
    from phd_megatron.runtime.cpu_backend.p2p import batched_p2p_ops, p2p_ops

    put(module, _p2p_ops=p2p_ops, _batched_p2p_ops=batched_p2p_ops)


def _moe_splits(module: ModuleType) -> None:
    def to_host(
        tensor: torch.Tensor | None, as_numpy: bool = False, record_stream: bool = False
    ) -> torch.Tensor | np.ndarray | None:
        import torch

        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    put(module, maybe_move_tensor_to_cpu=to_host)


def _uneven_splits(module: ModuleType) -> None:
    from phd_megatron.runtime.cpu_backend import uneven_splits

    put(
        module,
        _gather_along_first_dim=uneven_splits.gather(module._gather_along_first_dim),
        _reduce_scatter_along_first_dim=uneven_splits.reduce_scatter(module._reduce_scatter_along_first_dim),
    )


def _single_rank(module: ModuleType) -> None:
    import functools

    def alone(collective: Callable[..., dist.Work | None]) -> Callable[..., dist.Work | None]:
        @functools.wraps(collective)
        def run(
            output: torch.Tensor,
            given: torch.Tensor,
            *args: dist.ReduceOp,
            group: dist.ProcessGroup,
            async_op: bool = False,
            **kwargs: dist.ReduceOp,
        ) -> dist.Work | None:
            if async_op or group.size() > 1:
                return collective(output, given, *args, group=group, async_op=async_op, **kwargs)
            if output.data_ptr() != given.data_ptr():
                output.copy_(given)
            return None

        return run

    put(
        module,
        dist_all_gather_func=alone(module.dist_all_gather_func),
        dist_reduce_scatter_func=alone(module.dist_reduce_scatter_func),
    )


#: redirects that change no megatron module: a tensor's methods ``cuda`` and ``record_stream`` (which the schedule that
#: overlaps experts' transfers calls) do nothing; Transformer Engine and apex cannot be imported, because megatron takes
#: their CUDA optimizers and norms wherever it finds them; kernels that need triton are left out where it is missing
METHODS = ("tensor-cuda", "record-stream", "cuda-packages", "triton-kernels")

#: every redirect of the CPU backend; those without modules are parts of "torch"
REDIRECTS = (
    Redirect("cuda-names", (), _made_in_torch_names, "torch.cuda.{current_device,synchronize,Stream,...} raise"),
    Redirect("device-literals", (), _made_in_torch_names, 'torch.zeros(..., device="cuda") raises'),
    Redirect("jit-fuser", ("megatron.core.jit",), _jit_fuser, "torch.compile on CPU needs a C++ compiler"),
    Redirect("rng", ("megatron.core.tensor_parallel.random",), _rng, "the tracker forks the CUDA generator"),
    Redirect(
        "distrib-optimizer-types",
        ("megatron.core.optimizer.distrib_optimizer",),
        _distrib_optimizer_types,
        "the distributed optimizer refuses parameters whose type() is not torch.cuda.*",
    ),
    Redirect(
        "float16-optimizer-types",
        ("megatron.core.optimizer.optimizer",),
        _float16_optimizer_types,
        "the optimizer of bf16 without sharding refuses parameters whose type() is not torch.cuda.*",
    ),
    Redirect(
        "clip-grads-types",
        ("megatron.core.optimizer.clip_grads",),
        _clip_grads_types,
        "gradient clipping asserts torch.cuda.FloatTensor",
    ),
    Redirect(
        "p2p",
        ("megatron.core.pipeline_parallel.p2p_communication",),
        _p2p,
        "gloo pairs messages by tag and sends from memory that the schedule frees",
    ),
    Redirect(
        "moe-splits",
        ("megatron.core.transformer.moe.moe_utils", "megatron.core.transformer.moe.token_dispatcher"),
        _moe_splits,
        "token counts stay tensors, because the conversion is only made for CUDA tensors",
    ),
    Redirect(
        "uneven-splits",
        ("megatron.core.tensor_parallel.mappings",),
        _uneven_splits,
        "gloo gathers and scatters equal shares only; experts with tensor parallelism get unequal ones",
    ),
    Redirect(
        "single-rank",
        ("megatron.core.distributed.param_and_grad_buffer",),
        _single_rank,
        "gloo copies all gradients and parameters to themselves where a group has one rank; NCCL leaves them",
    ),
)
