"""From a directory to an engine: what the server and the chat in the terminal have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from phd_megatron.huggingface.decoding import decode_kernel, takes_decode_kernel
from phd_megatron.huggingface.generation import load
from phd_megatron.serving.decoder import Decoder
from phd_megatron.serving.engine import Engine
from phd_megatron.serving.limits import Limits, model_length
from phd_megatron.serving.served import Served, unused_defaults
from phd_megatron.serving.watch import Watch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to work, and notes for whoever starts it."""

    model: PreTrainedModel
    served: Served
    decoder: Decoder
    limits: Limits
    notes: tuple[str, ...]


def load_served(
    directory: str,
    limits: Limits,
    *,
    name: str | None = None,
    device: str | None = None,
    verify_checkpoint: bool = True,
    max_model_len: int | None = None,
) -> Loaded:
    """The model of an export or of a checkpoint.

    Args:
        limits: whose ``max_model_len`` follows from the model and what was asked for.
        name: what clients call it; the directory's own name unless given.

    Raises:
        UserError: it cannot be loaded, or computes nothing.
    """
    model, tokenizer = load(directory, device, verify_checkpoint=verify_checkpoint)
    limits = replace(limits, max_model_len=model_length(model, max_model_len))
    served, decoder, notes = Served(name or Path(directory).resolve().name, model, tokenizer), Decoder(model), []
    if unused := unused_defaults(model):
        notes.append(f"note: generation_config.json says {', '.join(unused)}; a request says how tokens are chosen")
    if not decoder.joins and limits.max_batch_size > 1:
        notes.append(f"note: the cache of {type(model).__name__} takes no rows in and out: one is computed at a time")
    return Loaded(model, served, decoder, limits, tuple(notes))


@contextmanager
def engine_of(loaded: Loaded, kernel: str = "auto", watch: Watch | None = None) -> Iterator[Engine]:
    """The model at work, until the end of the block.

    Args:
        kernel: attention of steps of one token, as in :func:`~phd_megatron.huggingface.generation.generate_text`.

    Raises:
        UserError: the kernel cannot run here.
    """
    with decode_kernel(loaded.model) if takes_decode_kernel(loaded.model, kernel) else nullcontext():
        engine = Engine(loaded.decoder, loaded.limits, watch)
        try:
            yield engine
        finally:
            engine.stop()
