"""Validation in training: when it is due, on which samples, and its loss."""

from __future__ import annotations

from phd_megatron.config.schema import RunConfig
from phd_megatron.data.evaluation import EvenBatches
from phd_megatron.data.samples import Samples
from phd_megatron.errors import UserError
from phd_megatron.runtime.context import Runtime
from phd_megatron.training.step import Stepper
from phd_megatron.training.streams import open_stream


def crosses(before: int, after: int, total: int, parts: int) -> bool:
    """Whether one of the places ``k * total / parts``, k = 1, 2, ..., lies in ``(before, after]``, all in one unit.

    In samples, runs of one length are validated at the same places whatever their batch size. A resumed run neither
    repeats a validation nor misses one.
    """
    return before * parts // total < after * parts // total


class Validation:
    """The same samples each time: the first ones of a pass over the validation split.

    Args:
        dataset: the pass.
        total: training samples that the steps of the run take.
        steps: of a run that is counted in iterations; its validations are spread over those then.

    Raises:
        UserError: when a step would reach two of the places of ``evals_per_run``.
    """

    def __init__(
        self, run: RunConfig, runtime: Runtime, dataset: Samples, total: int, steps: int | None = None
    ) -> None:
        training = run.training
        assert training.global_batch_size is not None
        self._training, self._total, self._steps = training, total, steps
        most = total // training.global_batch_size if steps is None else steps
        if training.evals_per_run is not None and training.evals_per_run > most:
            raise UserError(
                f"evals_per_run={training.evals_per_run}: a step of {training.global_batch_size} of the run's {total} "
                f"samples would reach two of them; ask for at most {most}"
            )
        self._count = runtime.dims.microbatches(training)
        asked = training.eval_iters * training.global_batch_size
        self.samples = min(asked, len(dataset))
        if self.samples < asked:
            runtime.log(
                f"note: a validation reads {self.samples} samples, which is all that the validation split has; "
                f"eval_iters={training.eval_iters} x global_batch_size={training.global_batch_size} are {asked}"
            )
        batches = EvenBatches(dataset, self.samples, training.global_batch_size)
        self._batches = len(batches) // training.global_batch_size
        self._stream = open_stream(run, runtime, batches)

    def is_due(self, iteration: int, before: int, after: int) -> bool:
        """After the step ``iteration``, which brought the consumed samples from ``before`` to ``after``."""
        parts = self._training.evals_per_run
        if parts is not None and self._steps is not None:
            return crosses(iteration - 1, iteration, self._steps, parts)
        if parts is not None:
            return crosses(before, after, self._total, parts)
        assert self._training.eval_interval is not None  # derived by resolve
        return iteration % self._training.eval_interval == 0

    def loss(self, stepper: Stepper) -> float:
        """Mean over the tokens that carry loss; collective."""
        stream = self._stream.microbatches(0, self._count * self._batches)
        total, tokens = stepper.evaluate(stream, self._batches, self._count).tolist()
        return total / tokens

    def close(self) -> None:
        """End the data workers."""
        self._stream.close()
