"""What every Triton kernel here needs: whether it can run, how it is tuned, how precisely it multiplies.

Kernels use the subset of Triton that 3.6 and 3.9 share. With ``TRITON_INTERPRET=1`` in the environment before the first
import they run on the CPU in Python, for tests: slowly, in float32 or float16, and without tuning.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

OLDEST = (3, 6)
TYPES = (torch.float32, torch.float16, torch.bfloat16)


Grid: TypeAlias = tuple[int, ...] | Callable[[dict[str, int]], tuple[int, ...]]  # programs, or by a tile's constants
Argument: TypeAlias = Tensor | float | str | tuple[int, ...] | tuple[Tensor, ...]


class Kernel(Protocol):
    """What ``triton.jit`` and :func:`tuned` make: indexed with a grid it is launched."""

    def __getitem__(self, grid: Grid) -> Callable[..., None]: ...


class Tile(NamedTuple):
    """One point of a tuning space: constants of the kernel, warps of a program, stages of its load pipeline."""

    constants: dict[str, int]
    warps: int = 4
    stages: int = 2


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_problem(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why Triton kernels cannot run on this device in this type, or None where they can."""
    device = torch.device(device)
    if importlib.util.find_spec("triton") is None:
        return f"triton is not installed; pip install 'triton>={OLDEST[0]}.{OLDEST[1]}' (Linux)"
    if dtype not in TYPES:
        return f"it computes in float32, float16 and bfloat16, not in {str(dtype).removeprefix('torch.')}"
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        return f"triton {triton.__version__} is older than {OLDEST[0]}.{OLDEST[1]}; pip install --upgrade triton"
    if interpreted():
        # The interpreter multiplies the bit patterns of bfloat16 numbers, without an error.
        return "Triton's interpreter has no bfloat16 products; use float32" if dtype == torch.bfloat16 else None
    if device.type != "cuda":
        return f"Triton kernels run on a GPU, not on {device.type} (TRITON_INTERPRET=1 interprets them, for tests)"
    return None


@cache
def runs_on_gpu(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a tensor there is best served by a Triton kernel: on a GPU, where Triton can run."""
    return device.type == "cuda" and triton_problem(device, dtype) is None


def tuned(space: Sequence[Tile], key: Sequence[str], **options: list[str]) -> Callable[[Kernel], Kernel]:
    """Decorator: the quickest of ``space`` for each value of the arguments ``key`` and each set of data types.

    The choice is kept on disk in Triton's cache, so a shape is tuned once a machine. The last of ``space`` is its
    smallest; the interpreter takes it, and ``PHD_TRITON_TUNE=0`` leaves nothing else to try.
    """
    import triton

    def decorate(kernel: Kernel) -> Kernel:
        if interpreted():
            return FixedTile(kernel, space[-1].constants)
        tiles = space if os.environ.get("PHD_TRITON_TUNE", "1") != "0" else space[-1:]
        configs = [triton.Config(dict(t.constants), num_warps=t.warps, num_stages=t.stages) for t in tiles]
        return triton.autotune(configs, list(key), cache_results=True, **options)(kernel)

    return decorate


class FixedTile:
    """A kernel with the constants of one tile, launched like a tuned one."""

    def __init__(self, kernel: Kernel, constants: dict[str, int]) -> None:
        self.fn, self.constants = kernel, constants

    def __getitem__(self, grid: Grid) -> Callable[..., None]:
        def launch(*args: Argument, **kwargs: Argument) -> None:
            self.fn[grid](*args, **kwargs, **self.constants)

        return launch


def precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: float32 products follow ``torch.set_float32_matmul_precision``."""
    exact = dtype != torch.float32 or interpreted() or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def covering(size: int) -> int:
    """The power of two that covers ``size`` columns, 1 for none."""
    return 1 << max(size - 1, 0).bit_length()


def block_of(size: int) -> int:
    """The same, and wide enough for a tensor core."""
    return max(16, covering(size))
