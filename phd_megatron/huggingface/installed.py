"""The exported model's classes as this package has them, for directories whose own code shall not run.

An export carries the files flat in one directory, while here they lie in several packages under other names. So a
module finder of a few lines puts them together under one name. Exports of every release load with them: what an older
``config.json`` does not say has a default that means what was computed then.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from phd_megatron.huggingface.bundle_files import bundle_files
from phd_megatron.huggingface.families.phd import AUTO_MAP

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PACKAGE = "phd_megatron_exported_model"


class _Finder(MetaPathFinder):
    """Finds ``PACKAGE`` and the files of an export in it."""

    def __init__(self) -> None:
        self.files = {f"{PACKAGE}.{name.removesuffix('.py')}": path for name, path in bundle_files().items()}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The standard library's protocol; None for every other module."""
        if fullname == PACKAGE:
            return ModuleSpec(PACKAGE, None, is_package=True)
        source = self.files.get(fullname)
        return None if source is None else spec_from_file_location(fullname, source)


def differing_files(directory: Path) -> list[str]:
    """Python files of a directory, by name, that are not byte for byte this package's."""
    own = bundle_files()
    return [
        path.name
        for path in sorted(directory.glob("*.py"))
        if path.name not in own or path.read_bytes() != own[path.name].read_bytes()
    ]


def bundled(name: str) -> ModuleType:
    """A module of the exported model's own code by its name in an export, such as ``modeling_phd``."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
    return importlib.import_module(f"{PACKAGE}.{name}")


def _class(what: str) -> type:
    module, _, name = AUTO_MAP[what].partition(".")
    found: type = getattr(bundled(module), name)
    return found


def config_class() -> type[PreTrainedConfig]:
    """Class of the bundled model's configuration."""
    return _class("AutoConfig")


def model_class() -> type[PreTrainedModel]:
    """Class of the bundled model."""
    return _class("AutoModelForCausalLM")
