"""What megatron-core gets when it says ``torch`` on CPU: torch itself, with the CUDA names answered by the host.

Megatron's modules look up ``torch`` in their own globals, so giving them this module redirects them and nobody else:
torch itself is unchanged for user code and for transformers, and operators are called without any interception.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, TypeAlias

import torch

CPU = torch.device("cpu")
Device: TypeAlias = torch.device | str | int | None

#: functions that take ``device=`` and to which megatron passes "cuda", some with ``pin_memory=True``
FACTORIES = ("tensor", "empty", "zeros", "ones", "arange", "empty_like")


class Stream:
    """A stream on a device that has only one: everything is in order already."""

    def __init__(self, *args: Device, **kwargs: Device) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return id(self)

    def wait_stream(self, stream: Stream) -> None:
        """Nothing runs elsewhere."""

    def wait_event(self, event: Event) -> None:
        """Nothing runs elsewhere."""

    def record_event(self, event: Event | None = None) -> Event:
        """Return the event, which has happened."""
        return event or Event()

    def synchronize(self) -> None:
        """Nothing runs elsewhere."""


class Event:
    """An event on a device without queues: it has happened."""

    def __init__(self, *args: Device, **kwargs: Device) -> None:
        pass

    def record(self, stream: Stream | None = None) -> None:
        """Nothing runs elsewhere."""

    def wait(self, stream: Stream | None = None) -> None:
        """Nothing runs elsewhere."""

    def synchronize(self) -> None:
        """Nothing runs elsewhere."""

    def query(self) -> bool:
        """Whether it has happened: always."""
        return True


def _nothing(*args: Device, **kwargs: Device) -> None:
    """Stands for a call that has no meaning on the host."""


@contextlib.contextmanager
def _stream_context(stream: Stream | None) -> Iterator[None]:
    yield


def get_rng_state(device: Device = None) -> torch.Tensor:
    """State of the host's generator."""
    return torch.get_rng_state()


def set_rng_state(new_state: torch.Tensor, device: Device = None) -> None:
    """Set the state of the host's generator."""
    torch.set_rng_state(new_state)


def _cuda_names() -> ModuleType:
    """The ``torch.cuda`` of a machine without CUDA: what megatron calls in training, and torch's own for the rest."""
    names = ModuleType("phd_megatron.runtime.cpu_backend.cuda")
    names.__dict__.update(
        current_device=lambda: CPU,
        device_count=lambda: 0,
        is_available=lambda: False,
        synchronize=_nothing,
        empty_cache=_nothing,
        Stream=Stream,
        Event=Event,
        stream=_stream_context,
        current_stream=lambda device=None: Stream(),
        default_stream=lambda device=None: Stream(),
        manual_seed=torch.manual_seed,
        get_rng_state=get_rng_state,
        set_rng_state=set_rng_state,
        nvtx=SimpleNamespace(range_push=_nothing, range_pop=_nothing),
    )
    names.__dict__["__getattr__"] = lambda name: getattr(torch.cuda, name)
    return names


def on_host(device: Device) -> Device:
    """The host for a device that names CUDA; any other device as it is."""
    return CPU if device is not None and str(device).startswith("cuda") else device


def _host_factory(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*args: Any, device: Device = None, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return factory(*args, device=on_host(device), **kwargs)

    make.__name__ = factory.__name__
    return make


def make_torch(*, cuda_names: bool = True, device_literals: bool = True) -> ModuleType:
    """A module that is torch, with CUDA names and ``device="cuda"`` answered by the host."""
    names = ModuleType("torch")
    names.__dict__.update(torch.__dict__)
    names.__dict__["__getattr__"] = lambda name: getattr(torch, name)
    if cuda_names:
        names.__dict__["cuda"] = _cuda_names()
    if device_literals:
        names.__dict__.update({name: _host_factory(getattr(torch, name)) for name in FACTORIES})
    return names
