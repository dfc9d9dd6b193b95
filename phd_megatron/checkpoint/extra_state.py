"""Transformer Engine's extra states in a checkpoint: scales and recipes of FP8, which it unpickles by itself.

So what a checkpoint holds is read here first, with an unpickler that knows the few names such a state is made of. Bytes
that pass name nothing else, and Transformer Engine may have them; those that name a function of a newer Megatron-Core
are written again with this one's.
"""

from __future__ import annotations

import enum
import io
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from phd_megatron.checkpoint.store import CheckpointError

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import StateDict

_RECIPES = "transformer_engine.common.recipe"
_TORCHS_LOADER = ("torch.storage", "_load_from_bytes")
_MEGATRONS_LOADER = ("megatron.core.safe_globals", "safe_load_from_bytes")  # in place of torch's since 0.17
_NAMES = {
    ("collections", "OrderedDict"),
    ("torch", "device"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("megatron.core.extensions.transformer_engine", "TEDelayedScaling"),
}


class _Unpickler(pickle.Unpickler):
    names_megatrons_loader = False

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (_TORCHS_LOADER, _MEGATRONS_LOADER):
            self.names_megatrons_loader |= (module, name) == _MEGATRONS_LOADER
            return _storage
        if (module, name) == ("builtins", "getattr"):
            return _member
        if (module, name) in _NAMES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module == _RECIPES and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == _RECIPES:
                return found
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no recipe or scale needs")


def _storage(content: bytes) -> torch.storage.TypedStorage:
    """Memory of a tensor, which torch pickles as a file of its own."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _member(kind: type, name: str) -> enum.Enum:
    """How some versions of Python pickle a member of an enumeration."""
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        member: enum.Enum = kind[name]
        return member
    raise pickle.UnpicklingError(f"it asks for the attribute {name!r} of something that is no enumeration")


def check(state: StateDict, path: Path) -> None:
    """Refuse the state dict of a model if an extra state in it holds more than recipes, scales and plain values.

    A state that this Megatron-Core might not read is replaced, in place.

    Args:
        path: of the checkpoint, for the message.

    Raises:
        CheckpointError: naming the first.
    """
    for key, value in state.items():
        if "_extra_state" not in key or value is None:
            continue
        try:
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"it is a {type(value).__name__}, as Transformer Engine before 2.0 wrote")
            if value.numel():  # a layer that never computed in FP8 has none
                unpickler = _Unpickler(io.BytesIO(value.detach().cpu().numpy().tobytes()))
                content = unpickler.load()
                if content is not None and not isinstance(content, dict):
                    raise TypeError(f"it holds a {type(content).__name__}, not a mapping")
                if unpickler.names_megatrons_loader:
                    state[key] = torch.frombuffer(bytearray(pickle.dumps(content)), dtype=torch.uint8)
        except Exception as error:
            raise CheckpointError(
                f"{path} holds a state of Transformer Engine that is not read: {key}: {error}; load the parameters "
                "into a run with transformer_impl=local, or save the checkpoint again with Transformer Engine 2"
            ) from error
