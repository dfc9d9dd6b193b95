"""One object that knows the device, the process groups and this process's place in them."""

from __future__ import annotations

import atexit
import os
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from phd_megatron.config.plain import Values
from phd_megatron.config.schema import ModelConfig, ParallelConfig, TrainingConfig
from phd_megatron.console.terminal import say
from phd_megatron.errors import RunLost, UserError
from phd_megatron.runtime.environment import Environment
from phd_megatron.runtime.flight_recorder import record_flights
from phd_megatron.runtime.fp8 import forget_fp8_scales
from phd_megatron.runtime.parallel_dims import ParallelDims
from phd_megatron.runtime.userbuffers import stop_userbuffers
from phd_megatron.runtime.watch import Watch, died_together

if TYPE_CHECKING:
    import torch

_NCCL_SLACK = 15.0  # seconds in which NCCL writes its record and ends by itself


def install_backend(device: str) -> None:
    """Make megatron usable on a device of that type ("cpu" or "cuda"). Call before megatron is imported."""
    from phd_megatron.runtime import mcore_fixes

    if device == "cpu":
        from phd_megatron.runtime import cpu_backend

        cpu_backend.install()
    mcore_fixes.install()


def choose_device(asked: str, local_rank: int = 0) -> tuple[Literal["cpu", "cuda"], str]:
    """Device type for ``--device`` and why.

    Raises:
        UserError: cuda was asked for and there is none, or fewer devices than local ranks.
    """
    if asked == "cpu":
        return "cpu", "--device cpu"
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        if asked == "cuda":
            raise UserError(
                f"--device cuda, but torch {torch.__version__} sees no CUDA device: check `nvidia-smi` and that torch "
                "is a CUDA build, or use --device cpu"
            )
        return "cpu", "torch sees no CUDA device"
    if local_rank >= count:
        raise UserError(
            f"local rank {local_rank} has no CUDA device of its own, this host has {count}: start at most {count} "
            "processes per host, or use --device cpu"
        )
    return "cuda", f"{count} CUDA device{'s' if count > 1 else ''} on this host"


def usable_cores() -> int:
    """CPU cores this process may use: its affinity, and the container's quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return cores


def choose_threads(environment: Environment, variables: Mapping[str, str] | None = None) -> tuple[int | None, str]:
    """CPU threads of this process and why; None leaves torch's own choice.

    torchrun sets ``OMP_NUM_THREADS=1`` for several processes when it is not set, which leaves most cores idle; the
    value 1 under torchrun is therefore taken as "not chosen". ``PHD_MEGATRON_THREADS`` is obeyed always.
    """
    variables = os.environ if variables is None else variables
    if asked := variables.get("PHD_MEGATRON_THREADS"):
        if not asked.isdigit() or int(asked) < 1:
            raise UserError(f"PHD_MEGATRON_THREADS={asked!r} is not a number of threads; set 1 or more, or unset it")
        return int(asked), "PHD_MEGATRON_THREADS"
    if variables.get("OMP_NUM_THREADS") and not (
        environment.local_world_size > 1 and variables["OMP_NUM_THREADS"] == "1"
    ):
        return None, "OMP_NUM_THREADS"
    cores = usable_cores()
    threads = max(1, cores // environment.local_world_size)
    return threads, f"{cores} cores for {environment.local_world_size} processes on this host"


class Runtime:
    """Device and process groups of a run. Made by :meth:`start`; usable as a context manager."""

    def __init__(
        self,
        environment: Environment,
        dims: ParallelDims,
        device: torch.device,
        backend: str,
        reasons: str,
        watch: Watch,
    ) -> None:
        self.rank = environment.rank
        self.world_size = environment.world_size
        self.local_rank = environment.local_rank
        self.dims = dims
        self.device = device  #: torch.device
        self.backend = backend  #: "nccl" or "gloo"
        self.watch = watch  #: told what this rank does, so that others can say where it was
        self._reasons = reasons
        self._open = True

    @classmethod
    def start(
        cls,
        parallel: ParallelConfig,
        *,
        model: ModelConfig | None = None,
        training: TrainingConfig | None = None,
        seed: int = 1234,
        config: Values | None = None,
        verbose: bool = True,
        record_dir: str | None = None,
    ) -> Runtime:
        """Check the layout, find the other ranks, and build megatron's process groups and random-number states.

        Args:
            parallel: layout, device and timeout.
            model, training: when both are given, the layout is checked against them before anything is built.
            seed: of dropout; pipeline stages and tensor ranks get different ones, as in Megatron.
            config: the resolved configuration as plain values; all ranks must have the same.
            verbose: print one line about the device and the layout on rank 0.
            record_dir: directory for NCCL's flight recorder, which need not be there yet; default the temporary one.

        Raises:
            UserError: for a layout that does not fit, a missing device, missing ranks, or ranks that differ.
        """
        environment = Environment.read()
        environment.export()
        dims = ParallelDims.from_config(parallel, environment.world_size)
        if model is not None and training is not None:
            dims.validate(model, training)
        kind, device_reason = choose_device(parallel.device, environment.local_rank)
        install_backend(kind)

        device, backend, thread_reason = _open_device(kind, environment, record_dir)
        watch = _connect(environment, backend, device, parallel.distributed_timeout_minutes, config)
        runtime = cls(environment, dims, device, backend, f"{device_reason}{thread_reason}", watch)
        atexit.register(runtime.shutdown)
        with runtime.naming_lost_ranks():
            initialize_megatron(dims, parallel, seed)
        if verbose:
            runtime.log(runtime.describe())
            for note in dims.notes:
                runtime.log(f"note: {note}")
        return runtime

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes files that exist once."""
        return self.rank == 0

    @property
    def on_cpu(self) -> bool:
        """Whether the run is on the CPU."""
        return self.device.type == "cpu"

    @property
    def device_name(self) -> str:
        """What the device calls itself, such as ``NVIDIA H200``; ``cpu`` on the CPU."""
        if self.on_cpu:
            return "cpu"
        import torch

        return torch.cuda.get_device_name(self.device)

    def describe(self) -> str:
        """Device, backend, world size and layout on one line, with the reasons."""
        ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        return f"device {self.device.type} with {self.backend}, {ranks}: {self.dims.describe()} ({self._reasons})"

    def log(self, message: str) -> None:
        """Print on rank 0."""
        if self.is_main:
            say(message)

    def barrier(self) -> None:
        """Wait for all ranks."""
        import torch.distributed as dist

        if self.backend == "nccl":
            dist.barrier(device_ids=[self.local_rank])
        else:
            dist.barrier()

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if not self.on_cpu:
            import torch

            torch.cuda.synchronize(self.device)

    def memory(self) -> dict[str, float]:
        """Peak memory of this rank in GiB: ``peak`` of the device (of the process on CPU), ``host`` of the process."""
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
        if self.on_cpu:
            return {"peak": host, "host": host}
        import torch

        return {"peak": torch.cuda.max_memory_allocated(self.device) / 2**30, "host": host}

    @contextmanager
    def naming_lost_ranks(self) -> Iterator[None]:
        """Say in one line which rank has died or does not answer, where a collective inside fails because of it.

        Raises:
            RunLost: in place of the collective's error, with the same words on all ranks.
        """
        try:
            yield
        except Exception as error:
            if not self._lost_others(error):
                raise
            raise RunLost(self.watch.explain(error)) from error

    def _lost_others(self, error: BaseException | None) -> bool:
        if self.world_size == 1 or error is None or isinstance(error, UserError):
            return False
        return died_together(error) or (isinstance(error, Exception) and self.watch.has_ended)

    def shutdown(self) -> None:
        """Take the process groups down. Called at exit too; a second call does nothing."""
        if not self._open:
            return
        self._open = False
        atexit.unregister(self.shutdown)
        lost = self.watch.has_ended
        self.watch.stop()
        import torch.distributed as dist

        stop_userbuffers()
        forget_fp8_scales()
        if "megatron.core.parallel_state" in sys.modules:
            sys.modules["megatron.core.parallel_state"].destroy_model_parallel()
        if dist.is_initialized() and not lost:  # groups with a rank that is gone wait for it; this process ends anyway
            dist.destroy_process_group()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self.naming_lost_ranks():
                if error is None:
                    self.barrier()  # gloo reports "connection closed by peer" on ranks that are still busy
                elif self._lost_others(error):
                    raise error
        finally:
            self.shutdown()


def initialize_megatron(dims: ParallelDims, parallel: ParallelConfig, seed: int) -> None:
    """Megatron-Core's process groups of connected ranks, and random-number states of this one."""
    import numpy as np
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=dims.tp,
        pipeline_model_parallel_size=dims.pp,
        virtual_pipeline_model_parallel_size=dims.vpp,
        context_parallel_size=dims.cp,
        expert_model_parallel_size=dims.ep,
        expert_tensor_parallel_size=dims.etp,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(stage_seed)
    np.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)


def keep_freed_memory() -> None:
    """Let glibc keep the blocks that a step frees for the next step.

    By default it gives large ones back to the kernel, which then zeroes them page by page again: thousands of page
    faults a step, 5 % of a PHD step on CPU. Other C libraries are left alone.
    """
    import ctypes

    trim_threshold, mmap_threshold, mebibyte = -1, -3, 2**20  # numbers from malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(mmap_threshold, 32 * mebibyte)  # the most that glibc accepts
    mallopt(trim_threshold, 1024 * mebibyte)


def _open_device(
    kind: str, environment: Environment, record_dir: str | None
) -> tuple[torch.device, Literal["nccl", "gloo"], str]:
    """The device of this rank, the backend that goes with it, and what is to be said about threads."""
    import torch

    if kind == "cuda":
        device = torch.device("cuda", environment.local_rank)
        torch.cuda.set_device(device)
        record_flights(record_dir)
        return device, "nccl", ""
    keep_freed_memory()
    threads, reason = choose_threads(environment)
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.device("cpu"), "gloo", f"; {torch.get_num_threads()} threads a rank ({reason})"


def _connect(
    environment: Environment, backend: str, device: torch.device, timeout_minutes: float, config: Values | None
) -> Watch:
    """Find the other ranks, compare notes, and initialise torch.distributed. What watches this rank from then on."""
    import torch.distributed as dist

    from phd_megatron.runtime.rendezvous import rendezvous

    if dist.is_initialized():
        raise UserError("torch.distributed is initialised already; shut the other Runtime down first")
    timeout = timedelta(minutes=timeout_minutes)
    slack = _NCCL_SLACK if backend == "nccl" else 0.0
    if environment.launched:
        store, rank, world_size = rendezvous(environment, timeout, config)
    else:
        # A store inside this process: no port, so any number of such runs can share a host.
        store, rank, world_size = dist.HashStore(), 0, 1
    # A connection of its own: one that waits for a key would hold the thread up.
    own = store.clone() if world_size > 1 and hasattr(store, "clone") else None
    watch = Watch(own, rank, world_size, timeout.total_seconds(), slack)
    watch.start()
    try:
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device if backend == "nccl" else None,
        )
    except RuntimeError as error:
        if world_size == 1 or not died_together(error):
            raise
        raise RunLost(watch.explain(error)) from error
    return watch
