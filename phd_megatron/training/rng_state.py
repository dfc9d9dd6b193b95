"""The random-number state of one rank as plain tensors and numbers, so that it loads with ``weights_only=True``."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker


def capture(device: torch.device) -> dict[str, Any]:
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


def restore(state: dict[str, Any], device: torch.device) -> None:
    """Put back what :func:`capture` returned."""
    python, of_numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    numpy.random.set_state(
        (
            of_numpy["name"],
            of_numpy["keys"].numpy().astype("uint32"),
            of_numpy["position"],
            of_numpy["has_gauss"],
            of_numpy["cached"],
        )
    )
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


def _tensor(value: Any) -> torch.Tensor:
    # CUDA-graph safe trackers keep generators instead of state tensors
    return (value.get_state() if isinstance(value, torch.Generator) else value).clone()
