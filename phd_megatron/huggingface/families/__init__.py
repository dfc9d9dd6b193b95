"""The families that can be imported and exported: each file here is one, and its ``FAMILY`` the row."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from phd_megatron.huggingface.family import Family
from phd_megatron.norm.schemes import NORM_SCHEMES

if TYPE_CHECKING:
    from phd_megatron.huggingface.architecture import Architecture


def found() -> dict[str, Family]:
    """``model_type`` to row: in the order of the norm schemes, dense families first, the bundled one last."""
    modules = [importlib.import_module(f"{__name__}.{file.name}") for file in pkgutil.iter_modules(__path__)]
    rows: list[Family] = [module.FAMILY for module in modules]
    schemes = list(NORM_SCHEMES)

    def place(row: Family) -> tuple[bool, bool, int, str]:
        scheme = 0 if row.norm_scheme is None else schemes.index(row.norm_scheme)
        return row.is_bundled, bool(row.has_experts), scheme, row.model_type

    return {row.model_type: row for row in sorted(rows, key=place)}


FAMILIES = found()
#: the family whose code travels with the export, which computes every model
BUNDLED = next(row for row in FAMILIES.values() if row.is_bundled)


def export_family(architecture: Architecture, native: bool = True) -> Family:
    """The family as which a model is exported: one of transformers' own where it is exact, else the bundled one."""
    exact = (row for row in FAMILIES.values() if native and not row.is_bundled and row.computes(architecture))
    return next(exact, BUNDLED)
