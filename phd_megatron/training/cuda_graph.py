"""Forward and backward of a whole step as one CUDA graph.

That is ``cuda_graph_impl: local`` with ``cuda_graph_scope: full_iteration``.

Megatron-Core's ``FullCudaGraphWrapper`` (0.16.1) does not fit: it keeps graph, inputs and step count on the class, so
the second model of a process would replay the first; it records the finalisation of gradients, which there reads the
number of tokens on the host; and it records evaluation too, which costs the memory of a second graph.

A graph replays kernels on the addresses that they were recorded with. What that asks of a step, and where it is met:

- batches lie in fixed buffers (:class:`StaticBatches`); weights, gradient buffers and the loss scale of 1 never move;
- what makes gradients final (reductions, division by tokens) comes after the graph (:class:`Recorded`), as do clipping,
  the optimizer and whatever looks at gradients, so Python that must run in every step does;
- autograd adds a gradient to its buffer on the stream on which DDP first looked at the parameter, and the legacy
  default stream cannot be recorded: DDP is built, and steps are made, on one other stream (:func:`on_graph_stream`);
- kernels are compiled and tuned, caches filled and communicators made in the steps before;
- Transformer Engine keeps the FP8 form of a weight, and drops the transpose of it in evaluation, which would free
  memory that the graph writes to: steps outside of the graph get a cache of their own (:func:`weights_put_aside`). It
  is the only thing that such steps would replace; scales of the delayed recipe are updated in place, in the graph.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from phd_megatron.config.cuda_graph import is_graphed, warm_up_steps
from phd_megatron.config.schema import RunConfig
from phd_megatron.errors import UserError

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

Batch = dict[str, Tensor]
ForwardBackward = Callable[[Iterator[Batch]], list[Tensor]]
Finalization = tuple[list[nn.Module], Tensor | None, dict[str, Any]]
"""Arguments of ``finalize_model_grads_func``: chunks, number of tokens, and what Megatron-Core adds by name."""

_CACHE = "_fp8_workspaces"  #: attribute of Transformer Engine's modules: name to FP8 form of a weight


@cache
def _graph_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def keep_profiler() -> None:
    """Leave the library below torch's profiler loaded after a trace; to be called before the first one.

    It crashes when it is started again in a process with CUDA graphs (torch/profiler/profiler.py says so, and does the
    same for graphs that torch.compile makes).
    """
    for name, value in {"DISABLE_CUPTI_LAZY_REINIT": "1", "TEARDOWN_CUPTI": "0"}.items():
        os.environ.setdefault(name, value)


@contextmanager
def on_graph_stream() -> Iterator[None]:
    """Inside, work goes to the one stream of graphs, after all that was given before and before what comes after."""
    stream, outer = _graph_stream(), torch.cuda.current_stream()
    stream.wait_stream(outer)
    with torch.cuda.stream(stream):
        yield
    outer.wait_stream(stream)


def stream_of(run: RunConfig) -> AbstractContextManager[None]:
    """Where DDP must be built for a run: on the stream of graphs if it has one."""
    return on_graph_stream() if is_graphed(run.model) else nullcontext()


class StaticBatches:
    """Copies of a step's micro-batches on ``device``, at the same addresses in every step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[Batch] = []

    def fill(self, batches: Iterator[Batch], count: int) -> list[Batch]:
        """Copy the next ``count`` micro-batches.

        Raises:
            ValueError: if their number, names, types or shapes are not those of the first step.
        """
        drawn = [next(batches) for _ in range(count)]
        if not self._buffers:
            self._buffers = [
                {name: torch.empty_like(tensor, device=self._device) for name, tensor in batch.items()}
                for batch in drawn
            ]
        found, expected = _form(drawn), _form(self._buffers)
        if found != expected:
            raise ValueError(f"micro-batches {found} after ones of {expected}: a CUDA graph holds one form")
        for batch, buffers in zip(drawn, self._buffers, strict=True):
            for name, buffer in buffers.items():
                buffer.copy_(batch[name], non_blocking=True)
        return [dict(buffers) for buffers in self._buffers]


def _form(batches: Sequence[Batch]) -> list[dict[str, tuple[torch.dtype | int, ...]]]:
    return [{name: (x.dtype, *x.shape) for name, x in sorted(batch.items())} for batch in batches]


@dataclass
class Recorded:
    """What forward and backward of a step leave: loss reports, and calls that make gradients final, not made yet."""

    reports: list[Tensor]
    calls: list[Finalization] = field(default_factory=list)

    @classmethod
    def of(cls, config: TransformerConfig, run: ForwardBackward, batches: Sequence[Batch]) -> Recorded:
        """Run, with ``config.finalize_model_grads_func`` kept for later."""
        calls: list[Finalization] = []

        def keep(model: list[nn.Module], num_tokens: Tensor | None = None, **options: Any) -> None:
            calls.append((model, num_tokens, options))

        finalize, config.finalize_model_grads_func = config.finalize_model_grads_func, keep
        try:
            return cls(run(iter(batches)), calls)
        finally:
            config.finalize_model_grads_func = finalize

    def finalize(self, config: TransformerConfig) -> None:
        """Make the calls. What was recorded stays as it is: the token count is summed over ranks in a copy."""
        for model, num_tokens, options in self.calls:
            tokens = None if num_tokens is None else num_tokens.clone()
            config.finalize_model_grads_func(model, tokens, **options)


@contextmanager
def weights_put_aside(models: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, Transformer Engine's modules have no FP8 form of a weight yet; afterwards they have those from before."""
    kept = [(vars(m), vars(m)[_CACHE]) for model in models for m in model.modules() if _CACHE in vars(m)]
    for attributes, _ in kept:
        attributes[_CACHE] = {}
    try:
        yield
    finally:
        for attributes, weights in kept:
            attributes[_CACHE] = weights


class StepGraph:
    """Runs forward and backward of training steps: the first ones as they are, then recorded once and replayed.

    Args:
        models: the wrapped model chunk of this rank, built inside :func:`stream_of`.
        warm_up: steps before the one that is recorded, at least 1.
        device: where batches go.
        log: gets one line when the graph is there.
    """

    def __init__(
        self, models: Sequence[nn.Module], warm_up: int, device: torch.device, log: Callable[[str], None]
    ) -> None:
        self._models, self._log = models, log
        self._config: TransformerConfig = models[0].config
        self._left = warm_up
        self._batches = StaticBatches(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._recorded = Recorded([])
        keep_profiler()

    @classmethod
    def of_run(
        cls, run: RunConfig, models: Sequence[nn.Module], device: torch.device, log: Callable[[str], None]
    ) -> StepGraph | None:
        """The graph that a run asks for, or ``None``."""
        return cls(models, warm_up_steps(run.model), device, log) if is_graphed(run.model) else None

    def __call__(self, run: ForwardBackward, batches: Iterator[Batch], count: int, watched: bool) -> list[Tensor]:
        """Loss reports of a step, whose gradients are final.

        Args:
            run: forward and backward over the batches of an iterator.
            batches: ``count`` micro-batches are drawn.
            watched: hooks on the model want to see this step, so it is not replayed.

        Raises:
            UserError: if the step cannot be recorded.
        """
        inputs = self._batches.fill(batches, count)
        with on_graph_stream():
            if watched or self._left > 0:
                self._left -= 1
                with self.outside():
                    done = Recorded.of(self._config, run, inputs)
            else:
                if self._graph is None:
                    self._record(run, inputs)
                assert self._graph is not None
                self._graph.replay()
                done = self._recorded
        done.finalize(self._config)
        return done.reports

    def outside(self) -> AbstractContextManager[None]:
        """Around whatever runs the model without the graph."""
        return weights_put_aside(self._models) if self._graph is not None else nullcontext()

    def _record(self, run: ForwardBackward, inputs: Sequence[Batch]) -> None:
        if getattr(self._config, "fp8", None) and not any(_CACHE in vars(m) for m in self._models[0].modules()):
            raise UserError(
                f"cuda_graph_impl=local with fp8={self._config.fp8}: this Transformer Engine keeps FP8 weights "
                "elsewhere than 2.11 does, and evaluation could free what the graph uses; use cuda_graph_impl none"
            )
        began = time.perf_counter()
        graph = torch.cuda.CUDAGraph()
        try:
            # Threads that pin batches, save checkpoints or watch NCCL may do what this one may not.
            with torch.cuda.graph(graph, stream=_graph_stream(), capture_error_mode="thread_local"):
                self._recorded = Recorded.of(self._config, run, inputs)
        except RuntimeError as error:
            # Ending a broken recording fails too, and hides why it broke.
            first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            why = (str(first).strip().splitlines() or [type(first).__name__])[0]
            raise UserError(
                f"cuda_graph_impl=local: the step could not be recorded ({why}); use cuda_graph_impl none"
            ) from error
        self._graph = graph
        seconds = time.perf_counter() - began
        self._log(f"CUDA graph: forward and backward of {len(inputs)} micro-batches recorded in {seconds:.1f} s")
