"""Where a kernel bench runs: the device, the type and the number of threads that its flags ask for."""

from __future__ import annotations

import argparse
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phd_megatron.errors import UserError

if TYPE_CHECKING:
    import torch

#: worst relative Frobenius error that a type is allowed against the definition in float64
TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-2}


@dataclass(frozen=True)
class Place:
    """A device and the type of what is measured there."""

    device: torch.device
    dtype_name: str
    dtype: torch.dtype

    @property
    def on_cuda(self) -> bool:
        """Whether launches can be recorded, and memory be counted."""
        return self.device.type == "cuda"

    @property
    def machine(self) -> str:
        """What the device, or the processor, calls itself; it may say nothing."""
        import torch

        return torch.cuda.get_device_name(self.device) if self.on_cuda else platform.processor()

    @property
    def tolerance(self) -> float:
        """Of the type."""
        return TOLERANCES[self.dtype_name]

    def draw(self, generator: torch.Generator, *shape: int) -> torch.Tensor:
        """Normal numbers, the same on every device."""
        import torch

        return torch.randn(shape, generator=generator).to(self.device, self.dtype)


def choose_place(args: argparse.Namespace) -> Place:
    """What ``--device``, ``--dtype`` and ``--threads`` say; sets the number of threads.

    Raises:
        UserError: the device is none that torch knows or has.
    """
    import torch

    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {args.device} is none that torch knows; use cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: this torch sees no CUDA device; use --device cpu")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    name = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    return Place(device, name, getattr(torch, name))


def not_interpreted(problem: str | None) -> str | None:
    """Why a Triton kernel is not timed: what stands in its way, or that it would be interpreted; else None."""
    from phd_megatron.kernels.triton_support import interpreted

    return problem or ("it would be interpreted" if interpreted() else None)
