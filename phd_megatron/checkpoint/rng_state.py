"""The random-number state of one rank as plain tensors and numbers, so that it loads with ``weights_only=True``."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from phd_megatron.checkpoint.store import CheckpointError

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import StateDict
    from torch.distributed.checkpoint.metadata import STORAGE_TYPES


def capture(device: torch.device) -> StateDict:
    """State of Python's, numpy's and torch's generators and of Megatron's tracker; of CUDA's when on CUDA."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    state = {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "name": name,
            "keys": torch.from_numpy(numpy.asarray(keys, dtype="int64")),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "tracker": {key: _tensor(value) for key, value in get_cuda_rng_tracker().get_states().items()},
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def check(state: StateDict, path: Path) -> None:
    """Refuse what :func:`restore` could not put back, before anything is loaded.

    Args:
        path: of the checkpoint, for the message.

    Raises:
        CheckpointError: with the reason.
    """
    try:
        if not isinstance(state, dict):
            raise TypeError(f"it is a {type(state).__name__}, not a mapping")
        random.Random().setstate(_of_python(state["python"]))
        numpy.random.RandomState().set_state(_of_numpy(state["numpy"]))
        torch.Generator().set_state(state["torch"])
        for name, saved in state["tracker"].items():
            if not isinstance(name, str) or not isinstance(saved, torch.Tensor) or saved.dtype != torch.uint8:
                raise TypeError(f"the tracker's {name!r} is no state of a generator")
        cuda = state.get("cuda")
        if cuda is not None and (not isinstance(cuda, torch.Tensor) or cuda.dtype != torch.uint8):
            raise TypeError("cuda is no state of a generator")
    except Exception as error:
        raise _refusal(path, f"{type(error).__name__}: {error}") from error


def check_kind(entry: STORAGE_TYPES | None, path: Path) -> None:
    """Refuse a state that a checkpoint's table of contents gives as a tensor."""
    if isinstance(entry, TensorStorageMetadata):
        raise _refusal(path, "it is a tensor, not an object")


def _refusal(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} holds a random-number state that cannot be put back ({why}); load another checkpoint, or this one "
        "without it with --no-load-rng"
    )


def _of_python(saved: StateDict) -> tuple[Any, ...]:
    return saved["version"], tuple(saved["words"].tolist()), saved["gauss"]


def _of_numpy(saved: StateDict) -> tuple[Any, ...]:
    words = saved["keys"].numpy().astype("uint32")
    return saved["name"], words, saved["position"], saved["has_gauss"], saved["cached"]


def restore(state: StateDict, device: torch.device) -> None:
    """Put back what :func:`capture` returned."""
    random.setstate(_of_python(state["python"]))
    numpy.random.set_state(_of_numpy(state["numpy"]))
    torch.set_rng_state(state["torch"])
    tracker = get_cuda_rng_tracker()
    current = tracker.get_states()
    for name, saved in state["tracker"].items():
        if isinstance(current.get(name), torch.Generator):
            current[name].set_state(saved)
        else:
            current[name] = saved
    tracker.set_states(current)
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _tensor(value: torch.Tensor | torch.Generator) -> torch.Tensor:
    # CUDA-graph safe trackers keep generators instead of state tensors
    return (value.get_state() if isinstance(value, torch.Generator) else value).clone()
