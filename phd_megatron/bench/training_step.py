"""A whole training step of ours, as ``pretrain`` takes it, to be timed: gradient buffers, clipping, optimizer."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from phd_megatron.console.terminal import show
from phd_megatron.errors import UserError

if TYPE_CHECKING:
    import torch

    from phd_megatron.config.schema import ModelConfig, RunConfig
    from phd_megatron.runtime.context import Runtime


class OurStep:
    """A model with its optimizer, which a call trains one step further; a context manager, which lets them go."""

    def __init__(self, config: RunConfig, runtime: Runtime) -> None:
        from phd_megatron.model.build import build_model
        from phd_megatron.training.engine import build_engine
        from phd_megatron.training.step import Stepper

        model, size = config.model, config.training.micro_batch_size
        self._runtime = runtime
        built = build_model(config, vocabulary_of(model), runtime.device)
        self._engine = build_engine(built, config, runtime.device, runtime.log)
        self._stepper = Stepper(self._engine, runtime.device, size, model.seq_length, model.phd_repeat)

    def __call__(self, *batches: dict[str, torch.Tensor]) -> tuple[float, float]:
        """Mean loss of the micro-batches, and the seconds that the step took."""
        self._runtime.synchronize()
        start = time.perf_counter()
        total, count = self._stepper.train(iter(batches), len(batches)).loss.tolist()
        self._runtime.synchronize()
        return float(total / count), time.perf_counter() - start

    def close(self) -> None:
        """Free what the wrapper of the model holds."""
        self._engine.let_go()

    def __enter__(self) -> OurStep:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def vocabulary_of(model: ModelConfig) -> int:
    """Entries of the vocabulary.

    Raises:
        UserError: if the configuration does not say it; it would be the tokenizer's.
    """
    if model.vocab_size is None:
        raise UserError(
            "vocab_size is not set, and nothing is measured without a vocabulary: give it, such as --options "
            "'--vocab-size 32000'"
        )
    return model.vocab_size


def random_tokens(model: ModelConfig, size: int, generator: torch.Generator) -> torch.Tensor:
    """``[size, s + 1]`` token ids. The time of a step does not depend on them, but for a router's balance."""
    import torch

    return torch.randint(0, vocabulary_of(model), (size, model.seq_length + 1), generator=generator)


def batch_of(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """A micro-batch of ``[b, s + 1]`` tokens, all of which count."""
    import torch

    size, length = tokens.size(0), tokens.size(1) - 1
    positions, mask = torch.arange(length).expand(size, -1), torch.ones(size, length)
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "position_ids": positions, "loss_mask": mask}


def sample_flops(model: ModelConfig) -> float:
    """FLOPs of training on one sample, by formula (:mod:`phd_megatron.planning.flops`)."""
    from phd_megatron.config.architecture import padded_vocab_size
    from phd_megatron.planning.flops import forward_flops

    rows = padded_vocab_size(vocabulary_of(model), model.make_vocab_size_divisible_by)
    return forward_flops(model, rows).training


def say_peak(peak: float | None) -> None:
    """What MFU is a share of."""
    if peak:
        show(f"MFU is the share of {peak:g} TFLOP/s, the dense bfloat16 peak")
