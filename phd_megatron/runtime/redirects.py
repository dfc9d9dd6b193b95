"""Change megatron-core's modules at the moment they are imported, each change under its own name and reason.

Megatron-core is used as it is published; what does not work on a given machine is redirected from outside. A
:class:`Redirect` names the modules it concerns and changes them right after they are executed (at once when they are
already imported), so nothing is imported that the run does not need, and names that other modules copy with
``from ... import`` are already the changed ones.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FunctionType, MethodType, ModuleType
from typing import Any

from phd_megatron.errors import UserError
from phd_megatron.runtime.mcore_versions import RANGE, installed, numbers


@dataclass(frozen=True)
class Redirect:
    """One change to megatron-core.

    ``modules`` are names or shell patterns; ``apply`` gets each matching module once, after its own code ran.
    ``until`` is the first version of megatron-core that does not need it, where one is known.
    """

    name: str
    modules: tuple[str, ...]
    apply: Callable[[ModuleType], None]
    reason: str
    until: str | None = None

    @property
    def is_needed(self) -> bool:
        """Whether the installed version needs it."""
        if self.until is None:
            return True
        here = installed()
        return here is None or here < numbers(self.until)

    def concerns(self, module_name: str) -> bool:
        """Whether this redirect changes the module of that name."""
        return any(fnmatch.fnmatchcase(module_name, pattern) for pattern in self.modules)


class MegatronChanged(UserError):
    """A redirect did not find what it is there to change: another megatron-core version."""


class _Watcher(MetaPathFinder):
    """Runs the redirects after the import of each megatron module."""

    def __init__(self) -> None:
        self.redirects: list[Redirect] = []
        self._busy: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith("megatron.") or fullname in self._busy:
            return None
        self._busy.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._busy.discard(fullname)
        if spec is not None and spec.loader is not None:
            self._wrap(spec)
        return spec

    def _wrap(self, spec: ModuleSpec) -> None:
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.run(module, self.redirects)

        loader.exec_module = exec_module

    @staticmethod
    def run(module: ModuleType, redirects: Iterable[Redirect]) -> None:
        for redirect in redirects:
            if redirect.concerns(module.__name__):
                try:
                    redirect.apply(module)
                except AttributeError as error:
                    raise MegatronChanged(
                        f"redirect {redirect.name!r} does not fit {module.__name__}: {error}; phd-megatron runs on "
                        f"megatron-core{RANGE}, see `phd-megatron doctor` for the installed version"
                    ) from error


_WATCHER = _Watcher()


def activate(redirects: Iterable[Redirect]) -> None:
    """Apply the redirects to every megatron module imported so far and from now on. A name is applied only once.

    Those that the installed version does not need any more are left out.
    """
    known = {redirect.name for redirect in _WATCHER.redirects}
    fresh = [redirect for redirect in redirects if redirect.name not in known and redirect.is_needed]
    if _WATCHER not in sys.meta_path:
        sys.meta_path.insert(0, _WATCHER)
    _WATCHER.redirects += fresh
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.") and module is not None:
            _WATCHER.run(module, fresh)


def active() -> tuple[str, ...]:
    """Names of the redirects in force, in the order in which they were activated."""
    return tuple(redirect.name for redirect in _WATCHER.redirects)


def put(place: ModuleType | type, **replacements: Callable[..., Any] | ModuleType | None) -> None:
    """Give names of a module or a class another value.

    Raises:
        AttributeError: a name is not there; of a redirect, that is :class:`MegatronChanged`.
    """
    for name, value in replacements.items():
        getattr(place, name)
        setattr(place, name, value)


@contextmanager
def replaced(place: ModuleType | type, **replacements: Callable[..., Any] | None) -> Iterator[None]:
    """Names of a module or a class with another value, for a while.

    Raises:
        AttributeError: a name is not there.
    """
    before = {name: getattr(place, name) for name in replacements}
    put(place, **replacements)
    try:
        yield
    finally:
        put(place, **before)


def replace_literals(function: FunctionType | MethodType, replacements: dict[str, str]) -> None:
    """Replace string literals in a function's code, in place, so that copies of its name change too.

    Raises:
        MegatronChanged: when none of the literals occurs in it.
    """
    target = function.__func__ if isinstance(function, MethodType) else function
    assert isinstance(target, FunctionType)
    found = False

    def changed(constant: Hashable) -> Hashable:
        nonlocal found
        if isinstance(constant, str) and constant in replacements:
            found = True
            return replacements[constant]
        if isinstance(constant, tuple):
            return tuple(changed(item) for item in constant)
        return constant

    constants = tuple(changed(constant) for constant in target.__code__.co_consts)
    if not found:
        raise MegatronChanged(f"{target.__qualname__} holds none of the literals {sorted(replacements)}")
    target.__code__ = target.__code__.replace(co_consts=constants)
