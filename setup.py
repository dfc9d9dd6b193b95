"""Which folder is which package; all else is in ``pyproject.toml``.

Each ``kernels/<op>`` of the checkout is installed as ``phd_megatron.kernels.<op>``, a mapping that has to be computed.
The folder ``kernels/`` itself is never a package, because that name belongs to a project on PyPI which transformers
imports when it finds it (``tests/unit/test_packaging.py`` holds this).
"""

from __future__ import annotations

from setuptools import find_packages, setup

# Path of each kernel package by import name, such as {"phd_megatron.kernels.phd_attention": "kernels/phd_attention"}.
KERNELS = {f"phd_megatron.kernels.{name}": f"kernels/{name.replace('.', '/')}" for name in find_packages("kernels")}

setup(
    packages=[*find_packages(include=["phd_megatron", "phd_megatron.*"]), *KERNELS],
    package_dir=KERNELS,
)
