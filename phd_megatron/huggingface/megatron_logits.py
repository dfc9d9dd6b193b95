"""What the Megatron-Core model of a checkpoint computes, in a process of its own, for an export to be compared with.

``python -m phd_megatron.huggingface.megatron_logits CHECKPOINT DTYPE TOKENS OUTPUT [CHANGES]`` builds the model on the
CPU in float32 from parameters rounded to ``DTYPE``, runs the token ids in ``TOKENS`` and writes the hidden states after
each layer, of the last copy and of the originals, and the logits. ``CHANGES`` is JSON: fields of the model's
configuration that shall be others than the checkpoint's. A process of its own, because Megatron-Core's CPU backend
changes the one it is in, and because its memory is free again before the export is loaded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from phd_megatron.config.precision import for_cpu
from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import ParallelConfig, RunConfig
from phd_megatron.huggingface.checkpoint import MegatronCheckpoint
from phd_megatron.runtime.context import Runtime

if TYPE_CHECKING:
    from collections.abc import Callable

    from megatron.core.models.gpt import GPTModel
    from torch.nn import Module

TOKENS, LOGITS, ORIGINALS = "tokens", "logits", "originals_"


def layer_name(index: int) -> str:
    """Name of the hidden states after the layer with this 0-based index."""
    return f"layer_{index}"


def inference_config(saved: RunConfig) -> RunConfig:
    """A configuration of the same function on one rank in float32, where nothing is dropped."""
    saved.parallel = ParallelConfig(device="cpu")
    saved.training.bf16 = saved.training.fp16 = False
    for_cpu(saved.model)
    extra = saved.model.transformer
    left = ("recompute_", "moe_expert_capacity_factor", "moe_pad_", "moe_token_drop")
    for name in [name for name in extra if name.startswith(left)]:
        del extra[name]
    resolve(saved)
    return saved


def fill_from(model: GPTModel, source: MegatronCheckpoint, dtype: torch.dtype) -> None:
    """Copy every tensor of the checkpoint, rounded to ``dtype``, into a model of one rank."""
    from megatron.core import parallel_state

    from phd_megatron.model.initialisation import fill, sharded_tensors

    def read(key: str) -> Tensor:
        whole = source.read(key)
        return whole if key.endswith("expert_bias") else whole.to(dtype)

    fill(sharded_tensors(model, parallel_state.get_data_parallel_group(with_context_parallel=True)), read)


@torch.no_grad()
def hidden_states_and_logits(model: GPTModel, tokens: Tensor, true_vocab_size: int) -> dict[str, Tensor]:
    """Hidden states by name and logits ``[b, n, vocabulary]`` of ``tokens`` ``[b, n]``.

    The states are ``[b, n, h]`` after each layer but the last, of the last copy and of the originals.
    """
    batch, length = tokens.shape
    found: dict[str, Tensor] = {}

    def keep(index: int) -> Callable[[Module, tuple[Tensor, ...], Tensor | tuple[Tensor, ...]], None]:
        def hook(module: Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            rows = output[0] if isinstance(output, tuple) else output  # [K*n, b, h], the last copy last
            found[layer_name(index)] = rows[-length:].transpose(0, 1).contiguous()
            found[f"{ORIGINALS}{index}"] = rows[:length].transpose(0, 1).clone(memory_format=torch.contiguous_format)

        return hook

    for index, layer in enumerate(model.decoder.layers[:-1]):
        layer.register_forward_hook(keep(index))
    logits = model.eval()(tokens, torch.arange(length).expand(batch, -1), None)
    return {**found, LOGITS: logits[..., :true_vocab_size].contiguous()}


def main(checkpoint: str, dtype: str, tokens: str, output: str, changes: str = "{}") -> None:
    """The program."""
    source = MegatronCheckpoint(checkpoint, verify=False)
    for name, value in json.loads(changes).items():
        setattr(source.run.model, name, value)
    run = inference_config(source.run)
    with Runtime.start(run.parallel, verbose=False) as runtime:
        from phd_megatron.model.build import build_model

        ids = load_file(tokens)[TOKENS]
        vocab_size = run.model.vocab_size
        assert vocab_size is not None  # completed when it was saved
        model = build_model(run, vocab_size, runtime.device)[0]
        fill_from(model, source, getattr(torch, dtype))
        save_file(hidden_states_and_logits(model, ids, vocab_size), Path(output))


if __name__ == "__main__":
    main(*sys.argv[1:])
