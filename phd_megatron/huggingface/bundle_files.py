"""The files that make an exported directory self-contained, each a byte copy of one source in this package."""

from __future__ import annotations

import shutil
from pathlib import Path

import phd_megatron.kernels

_ATTENTION = ("reference.py", "sdpa.py", "causal.py", "local.py", "folding.py", "by_document.py")
_PACKAGE = Path(__file__).resolve().parents[1]


def _kernel(path: str) -> Path:
    """A source under the kernels front door, whose search path differs between a checkout and a wheel."""
    for root in phd_megatron.kernels.__path__:
        if (found := Path(root) / path).exists():
            return found
    raise FileNotFoundError(f"{path} is in none of {list(phd_megatron.kernels.__path__)}; reinstall phd-megatron")


def bundle_files() -> dict[str, Path]:
    """File name in the exported directory to its source."""
    bundle = _PACKAGE / "huggingface" / "bundle"
    own = {path.name: path for path in sorted(bundle.glob("*_phd.py"))}
    return {
        **own,
        "kv_policy.py": _PACKAGE / "phd" / "kv_policy.py",
        "copy_positions.py": _PACKAGE / "phd" / "copy_positions.py",
        "documents.py": _PACKAGE / "phd" / "documents.py",
        "norm_schemes.py": _PACKAGE / "norm" / "schemes.py",
        **{name: _kernel(f"phd_attention/{name}") for name in _ATTENTION},
    }


def write_bundle(directory: Path) -> None:
    """Copy the files into ``directory``."""
    for name, source in bundle_files().items():
        shutil.copyfile(source, directory / name)
