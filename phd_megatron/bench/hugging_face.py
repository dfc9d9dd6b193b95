"""The peer of ``bench train``: a training step of transformers' Llama, in a process of its own.

It runs as it would without us: our runtime's settings of the process (how the C library keeps freed memory, warnings,
redirected modules) do not reach it, unless they are asked for. The time is taken inside that process.
"""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import TYPE_CHECKING

from phd_megatron.config.architecture import architecture_of
from phd_megatron.config.schema import OptimizerConfig, RunConfig
from phd_megatron.huggingface.rope import rope_words

if TYPE_CHECKING:
    import numpy as np
    import torch

    from phd_megatron.config.plain import Plain


@dataclass(frozen=True)
class Settings:
    """What the other process makes; it can be sent there.

    Attributes:
        llama: arguments of ``LlamaConfig``.
        optimizer: as of our run.
        weights: values by Hugging Face's names.
        dtype: of the weights.
    """

    llama: dict[str, Plain]
    optimizer: OptimizerConfig
    weights: dict[str, np.ndarray]
    dtype: str
    device: str
    autocast: bool
    threads: int
    keep_freed_memory: bool


class HuggingFaceStep:
    """``LlamaForCausalLM`` with SDPA, gradient clipping and ``AdamW(fused=True)``; a context manager.

    Args:
        config: the vanilla model that it shall equal.
        weights: values by Hugging Face's names.
        device: where it runs.
        autocast: float32 weights, computing in bfloat16.
        keep_freed_memory: with the allocator settings of our runtime.
    """

    def __init__(
        self,
        config: RunConfig,
        weights: dict[str, torch.Tensor],
        device: torch.device,
        autocast: bool = False,
        keep_freed_memory: bool = False,
    ) -> None:
        import torch

        model, options = config.model, config.optimizer
        llama: dict[str, Plain] = {
            "vocab_size": model.vocab_size,
            "hidden_size": model.hidden_size,
            "intermediate_size": model.ffn_hidden_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.num_query_groups,
            "max_position_embeddings": model.seq_length,
            "rms_norm_eps": model.layernorm_epsilon,
            "rope_parameters": rope_words(architecture_of(model)),
            "tie_word_embeddings": True,
            "attn_implementation": "sdpa",
            "use_cache": False,
        }
        self.settings = Settings(
            llama=llama,
            optimizer=options,
            weights={name: tensor.float().numpy() for name, tensor in weights.items()},
            dtype="bfloat16" if config.training.bf16 and not autocast else "float32",
            device=str(device),
            autocast=autocast,
            threads=torch.get_num_threads(),
            keep_freed_memory=keep_freed_memory,
        )

    def __enter__(self) -> HuggingFaceStep:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.settings), daemon=True)
        self.process.start()
        theirs.close()
        return self

    def __call__(self, tokens: torch.Tensor) -> tuple[float, float]:
        """Loss of the batch ``[b, s + 1]``, and the seconds that the step took."""
        self.connection.send(tokens.numpy())
        try:
            loss, seconds = self.connection.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(
                f"the process of Hugging Face's model ended with exit code {self.process.exitcode}; its message is "
                "above. With -9 the machine ran out of memory: choose a smaller size or batch"
            ) from None
        return loss, seconds

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.connection.close()  # ends the loop over there
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()


def _serve(connection: Connection, settings: Settings) -> None:
    """Steps until the other side closes the connection."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if settings.keep_freed_memory:
        from phd_megatron.runtime.context import keep_freed_memory

        keep_freed_memory()
    torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    with device:
        llama = LlamaForCausalLM(LlamaConfig(**settings.llama)).to(getattr(torch, settings.dtype))
    weights = {name: torch.from_numpy(values) for name, values in settings.weights.items()}
    missing, unexpected = llama.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"weights do not match: missing {missing}, unexpected {unexpected}")
    options = settings.optimizer
    optimizer = torch.optim.AdamW(
        llama.parameters(),
        lr=options.lr,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_eps,
        weight_decay=options.weight_decay,
        fused=True,
    )
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def step(tokens: torch.Tensor) -> float:
        tokens = tokens.to(device)
        optimizer.zero_grad()
        # shift_labels: score every token, as we do; by default the last position of a sample is not trained on
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.autocast):
            loss = llama(input_ids=tokens[:, :-1], labels=tokens[:, :-1], shift_labels=tokens[:, 1:].contiguous()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), settings.optimizer.clip_grad)
        optimizer.step()
        return float(loss.detach())

    while True:
        try:
            tokens = torch.from_numpy(connection.recv())
        except EOFError:
            return
        synchronize()
        start = time.perf_counter()
        loss = step(tokens)
        synchronize()
        connection.send((loss, time.perf_counter() - start))
