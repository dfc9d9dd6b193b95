"""Which versions were tested together, and where an environment stands among them."""

from __future__ import annotations

import ast
import importlib
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from phd_megatron.errors import UserError
from phd_megatron.runtime.mcore_versions import RANGE, numbers


@dataclass(frozen=True)
class Tested:
    """Versions that were there together when tests ran; None for what was not there, or not written down."""

    python: str
    torch: str
    megatron_core: str
    transformers: str | None
    transformer_engine: str | None
    where: str
    what: str

    def versions(self) -> dict[str, str | None]:
        """By the names of :data:`PACKAGES`."""
        return {name: getattr(self, name.replace("-", "_")) for name in PACKAGES}


#: Python and what we build on, by their names on PyPI
PACKAGES = ("python", "torch", "megatron-core", "transformers", "transformer-engine")
#: what a start says of, when it is newer: transformers has minor versions all the time, and training hardly uses it
_SAID_AT_A_START = ("python", "torch", "megatron-core", "transformer-engine")

TESTED = (
    Tested("3.11", "2.13.0", "0.16.1", "5.24.0", None, "CPU", "everything, with every commit"),
    Tested("3.12", "2.13.0", "0.19.2", "5.24.0", None, "CPU", "what depends on Megatron-Core, in thirds"),
    Tested("3.12", "2.11.0", "0.16.1", None, "2.11.0", "one H200", "kernels, layers, FP8 and CUDA graphs, by hand"),
    Tested("3.12", "2.11.0", "0.19.2", "5.17.0", "2.11.0", "one H200", "layers, FP8, waits and CUDA graphs, by hand"),
)


def newest(name: str) -> str:
    """The newest version of one of :data:`PACKAGES` that was tested."""
    return _tested(name)[-1]


def installed_versions() -> dict[str, str | None]:
    """What is installed here of :data:`PACKAGES`."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES[1:]:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def standing(found: Mapping[str, str | None]) -> dict[str, str]:
    """What is to be said of each installed version, compared up to its second number: ``tested``, or what is not."""
    said = {}
    for name, text in found.items():
        if text is None:
            said[name] = "not installed"
            continue
        here, tested = _minor(text), {_minor(row): row for row in _tested(name)}
        if here in tested:
            said[name] = "tested"
        elif here > max(tested):
            said[name] = f"newer than {tested[max(tested)]}, the newest that was tested"
        elif here < min(tested):
            said[name] = f"older than {tested[min(tested)]}, the oldest that was tested"
        else:
            said[name] = f"not tested; tested are {', '.join(tested[each] for each in sorted(tested))}"
    return said


def note_of_a_start(found: Mapping[str, str | None]) -> str | None:
    """One line when something is newer than all that was tested, and nothing that we ask of Megatron-Core is gone.

    Raises:
        UserError: something is gone.
    """
    said = standing({name: found[name] for name in _SAID_AT_A_START})
    newer = [f"{name} {found[name]} is {text}" for name, text in said.items() if text.startswith("newer")]
    if said["megatron-core"].startswith("newer") and (gone := missing_names()):
        raise UserError(
            f"megatron-core {found['megatron-core']} does not have {', '.join(gone)}; phd-megatron runs on "
            f"megatron-core{RANGE}, tested are {', '.join(_tested('megatron-core'))}: install one of those"
        )
    return f"untested: {'; '.join(newer)} (phd-megatron doctor)" if newer else None


def missing_names() -> list[str]:
    """What this package imports from Megatron-Core at run time, wherever it does, and the installed one lacks."""
    gone = []
    for module, name in _asked_of_megatron():
        try:
            there = importlib.import_module(module)
        except ImportError as error:
            if (error.name or "").startswith("megatron"):
                gone.append(module)
            continue  # else something beside it is missing, as Transformer Engine may be
        if not hasattr(there, name) and not _is_module(f"{module}.{name}"):
            gone.append(f"{module}.{name}")
    return sorted(set(gone))


def table() -> list[tuple[str, ...]]:
    """A head and a row for each of :data:`TESTED`, for people."""
    head = ("Python", "torch", "megatron-core", "transformers", "Transformer Engine", "where", "what runs")
    return [head, *((*(text or "-" for text in row.versions().values()), row.where, row.what) for row in TESTED)]


def _tested(package: str) -> list[str]:
    return sorted({text for row in TESTED if (text := row.versions()[package])}, key=numbers)


def _minor(text: str) -> tuple[int, ...]:
    return numbers(text)[:2]


@lru_cache(maxsize=1)
def _asked_of_megatron() -> tuple[tuple[str, str], ...]:
    """Module and name of every ``from megatron... import`` of this package that is more than an annotation."""
    import phd_megatron
    import phd_megatron.kernels

    roots = [Path(folder) for package in (phd_megatron, phd_megatron.kernels) for folder in package.__path__]
    files = sorted({path for root in roots for path in root.rglob("*.py")})
    return tuple(sorted({pair for path in files for pair in _imports(ast.parse(path.read_text("utf-8")))}))


def _imports(node: ast.AST) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.ImportFrom) and (child.module or "").partition(".")[0] == "megatron":
            yield from ((str(child.module), alias.name) for alias in child.names)
        else:
            yield from _imports(child)


def _is_module(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True
