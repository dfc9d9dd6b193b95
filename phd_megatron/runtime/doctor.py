"""What this machine will use for each operation, and why: the report of ``phd-megatron doctor``."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from phd_megatron.config.plain import Json
from phd_megatron.config.schema import RunConfig
from phd_megatron.runtime.capabilities import probe
from phd_megatron.runtime.compatibility import TESTED, Tested, installed_versions, standing, table
from phd_megatron.runtime.implementations import Operation, format_operations, operations
from phd_megatron.runtime.mcore_versions import RANGE


@dataclass(frozen=True)
class Package:
    """A package: its installed version (None when absent), what its absence costs, how to get it."""

    name: str
    version: str | None
    cost: str
    command: str


@dataclass
class Report:
    """Everything the doctor knows."""

    python: str
    platform: str
    device: str
    device_reason: str
    backend: str
    devices: list[str] = field(default_factory=list)
    packages: list[Package] = field(default_factory=list)
    tested: list[Tested] = field(default_factory=list)
    standing: dict[str, str] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)

    def as_dict(self) -> Json:
        """Plain values for JSON."""
        return asdict(self)


_TE_COST = "no FP8, no fused Adam, no grouped GEMM for experts"
#: name on PyPI, import name, what its absence costs, pip command; required packages first
_PACKAGES = (
    ("torch", "torch", "nothing runs without it", "pip install 'torch>=2.10'"),
    ("megatron-core", "megatron.core", "no training", f"pip install 'megatron-core{RANGE}'"),
    ("transformers", "transformers", "no HF tokenizer, export or generation", "pip install 'transformers>=5.12.1'"),
    ("tokenizers", "tokenizers", "no bpe:N tokenizer", "pip install tokenizers"),
    ("safetensors", "safetensors", "no export", "pip install safetensors"),
    ("psutil", "psutil", "saving a checkpoint hangs in megatron-core", "pip install psutil"),
    ("numpy", "numpy", "no data sets", "pip install numpy"),
    (
        "transformer-engine",
        "transformer_engine",
        _TE_COST,
        "pip install --no-build-isolation 'transformer_engine[pytorch]'",
    ),
    (
        "apex",
        "apex.optimizers",  # pip has another package of the name apex
        "torch computes what it would: the optimizer, and weight gradients (gradient_accumulation_fusion)",
        "build https://github.com/NVIDIA/apex; pip's package of that name is another one",
    ),
    (
        "flash-attn-4",
        "flash_attn.cute",
        "attention is cuDNN's, up to a quarter slower",
        "pip install --pre flash-attn-4",
    ),
    (
        "flash-attn",
        "flash_attn.layers",  # flash-attn-4 is a folder beside it
        "attention is cuDNN's or torch's own",
        "pip install --no-build-isolation flash-attn",
    ),
    ("triton", "triton", "no Triton kernels", "comes with the CUDA builds of torch"),
    ("deepspeed", "deepspeed", "no --deepspeed", "DS_BUILD_OPS=0 pip install 'deepspeed>=0.19,<0.20'"),
    ("tensorboard", "tensorboard", "no TensorBoard log", "pip install tensorboard"),
    ("wandb", "wandb", "no Weights & Biases log", "pip install wandb"),
    ("matplotlib", "matplotlib", "no loss plots", "pip install matplotlib"),
    ("rich", "rich", "plain progress lines", "pip install rich"),
)


def _installed(module: str) -> bool:
    """Whether it is there. Nothing is imported: a package of that name may be another one."""
    package, _, folder = module.partition(".")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    if spec is None or not folder:
        return spec is not None
    return any((Path(place) / folder).is_dir() for place in spec.submodule_search_locations or ())


def _packages() -> list[Package]:
    found = []
    for name, module, cost, command in _PACKAGES:
        installed: str | None = None
        if _installed(module):
            try:
                installed = version(name)
            except PackageNotFoundError:
                installed = "unknown version"
        found.append(Package(name, installed, cost, command))
    return found


def examine(device: str = "auto") -> Report:
    """Look at this machine. Nothing is changed; no process group is made.

    Args:
        device: as of ``--device``.

    Raises:
        UserError: cuda was asked for and there is none.
    """
    from phd_megatron.runtime.context import choose_device

    packages = _packages()
    report = Report(
        platform.python_version(),
        platform.platform(),
        "none",
        "torch is not installed",
        "none",
        [],
        packages,
        list(TESTED),
        standing(installed_versions()),
    )
    if not _installed("torch"):
        return report

    chosen, report.device_reason = choose_device(device)
    report.device = chosen
    report.backend = "nccl" if report.device == "cuda" else "gloo"
    report.devices = _devices()
    run = RunConfig()
    run.training.bf16 = report.device == "cuda"
    report.operations = [
        *operations(run, probe(chosen)),
        Operation("checkpoint writer", "torch distributed checkpoint", "one file per rank, written in this process"),
    ]
    return report


def _devices() -> list[str]:
    import torch

    from phd_megatron.runtime.context import usable_cores

    found = [f"cpu: {usable_cores()} usable of {os.cpu_count()} cores, {platform.processor() or platform.machine()}"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            memory = about.total_memory / 2**30
            found.append(
                f"cuda:{index}: {about.name}, {memory:.0f} GiB, compute capability {about.major}.{about.minor}"
            )
    return found


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def format_report(report: Report) -> str:
    """The report as text for a terminal."""
    lines = [
        f"python {report.python} on {report.platform} ({sys.executable})",
        f"device: {report.device} with {report.backend} ({report.device_reason})",
        *(f"  {device}" for device in report.devices),
        "",
        "packages:",
    ]
    width = max(len(package.name) for package in report.packages)
    for package in report.packages:
        if package.version is not None:
            lines.append(f"  {package.name:<{width}}  {package.version}")
        else:
            lines.append(f"  {package.name:<{width}}  not installed: {package.cost}. Get it: {package.command}")
    lines += ["", "versions that were tested together:", *_columns(table())]
    lines += ["here:", *(f"  {name:<{width}}  {said}" for name, said in report.standing.items())]
    if report.operations:
        lines += ["", "operations of a run with default settings:", format_operations(report.operations)]
    return "\n".join(lines)
