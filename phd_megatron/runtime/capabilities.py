"""What this machine can compute with: device, CUDA, Transformer Engine, apex. Probed once, and passed as plain facts.

Everything that chooses or refuses by them takes a :class:`Capabilities`, so that every branch can be tried anywhere.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

Version = tuple[int, int]


@dataclass(frozen=True)
class Capabilities:
    """Facts about the device that a run uses and the libraries that work on it.

    Attributes:
        device: where the model is.
        device_name: what a CUDA device calls itself.
        compute_capability: of the CUDA device: 8.0 Ampere, 8.9 Ada, 9.0 Hopper, 10.0 Blackwell.
        cuda: version of CUDA that torch was built with.
        transformer_engine: version of Transformer Engine, None where it cannot be used.
        transformer_engine_problem: why it cannot.
        triton_problem: why our Triton kernels cannot run, None where they can.
        apex_adam: apex has its fused Adam.
        apex_weight_gradient: apex can add a weight's gradient to the gradient buffer inside the GEMM.
        weight_gradient_problem: why torch cannot, None where it can.
        deepep_problem, hybridep_problem: why DeepEP and its HybridEP cannot be used, None where they can.
        memory: bytes of the device, or of the machine for a model on its CPU.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    device_name: str = "cpu"
    compute_capability: Version | None = None
    cuda: Version | None = None
    transformer_engine: Version | None = None
    transformer_engine_problem: str = "there is no CUDA device"
    triton_problem: str | None = "there is no CUDA device"
    apex_adam: bool = False
    apex_weight_gradient: bool = False
    weight_gradient_problem: str | None = None
    deepep_problem: str | None = "there is no CUDA device"
    hybridep_problem: str | None = "there is no CUDA device"
    memory: int | None = None

    @property
    def on_cuda(self) -> bool:
        """Whether the model is on a CUDA device."""
        return self.device == "cuda"


@functools.cache
def probe(device: Literal["cpu", "cuda"], index: int | None = None) -> Capabilities:
    """Look at this process's device and libraries. On the CPU nothing is imported: no library computes there."""
    if device == "cpu":
        return Capabilities(memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    import torch

    from phd_megatron.kernels.triton_support import triton_problem
    from phd_megatron.runtime.weight_gradient import problem as weight_gradient_problem

    te, problem = _transformer_engine()
    deepep, hybridep = _deep_ep()
    return Capabilities(
        device="cuda",
        device_name=torch.cuda.get_device_name(index),
        compute_capability=torch.cuda.get_device_capability(index),
        cuda=parse_version(torch.version.cuda or "0.0"),
        memory=torch.cuda.get_device_properties(index).total_memory,
        transformer_engine=te,
        transformer_engine_problem=problem,
        triton_problem=triton_problem("cuda", torch.bfloat16),
        deepep_problem=deepep,
        hybridep_problem=hybridep,
        apex_adam=_imports("apex.optimizers") is None,
        apex_weight_gradient=_imports("fused_weight_gradient_mlp_cuda") is None,
        weight_gradient_problem=weight_gradient_problem(),
    )


def parse_version(text: str) -> Version:
    """Major and minor number of a version such as ``12.9`` or ``2.11.0+abc``."""
    major, _, rest = text.partition(".")
    digits = rest.split(".")[0].split("+")[0]
    return int(major), int("".join(c for c in digits if c.isdigit()) or 0)


def version_text(numbers: Version) -> str:
    """``(12, 9)`` as ``12.9``."""
    return ".".join(map(str, numbers))


def _transformer_engine() -> tuple[Version | None, str]:
    """Version of Transformer Engine, or why it cannot be had: it is absent, or built for another CUDA or torch."""
    if importlib.util.find_spec("transformer_engine") is None:
        return None, "transformer-engine is not installed"
    # Megatron-Core takes its FP8 state from the second and, where that fails, goes on without Transformer Engine.
    for module in ("transformer_engine.pytorch", "transformer_engine.pytorch.fp8"):
        if problem := _imports(module):
            return None, f"transformer-engine is installed but {module} does not import ({problem})"
    number = getattr(
        importlib.import_module("transformer_engine"), "__version__", None
    )  # where Megatron-Core looks too
    try:
        return parse_version(str(number or version("transformer-engine"))), ""
    except (PackageNotFoundError, ValueError):
        return None, f"transformer-engine imports, but its version is {number!r}"


def _deep_ep() -> tuple[str | None, str | None]:
    """Why DeepEP and HybridEP, a class of some of its versions, cannot be had."""
    if importlib.util.find_spec("deep_ep") is None:
        return ("deep_ep is not installed",) * 2
    if problem := _imports("deep_ep"):
        return (f"deep_ep is installed but does not import ({problem})",) * 2
    has_hybrid = hasattr(importlib.import_module("deep_ep"), "HybridEPBuffer")
    return None, None if has_hybrid else "this deep_ep has no HybridEPBuffer"


def _imports(module: str) -> str | None:
    """None, or what its import raises: a library that does not fit raises anything."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
