"""Does a rank's share of the model fit at all?"""

from __future__ import annotations

from phd_megatron.config.architecture import padded_vocab_size
from phd_megatron.config.schema import RunConfig
from phd_megatron.console.tables import gib
from phd_megatron.errors import UserError
from phd_megatron.planning.memory import estimate_memory
from phd_megatron.planning.parameters import count_parameters
from phd_megatron.runtime.parallel_dims import ParallelDims


def refuse_what_cannot_fit(run: RunConfig, dims: ParallelDims, available: int, where: str) -> None:
    """Refuse a resolved run whose weights, gradients and optimizer states alone are more than a rank has.

    Activations are left out: whether they fit is found out in the first step, and depends on what is recomputed.

    Args:
        available: bytes of the rank's device.
        where: what that device is.

    Raises:
        UserError: with both sizes.
    """
    assert run.model.vocab_size is not None
    padded = padded_vocab_size(run.model.vocab_size, run.model.make_vocab_size_divisible_by)
    parameters = count_parameters(run.model, padded)
    memory = estimate_memory(run, parameters, padded, dims)
    needed = memory.weights + memory.gradients + memory.optimizer
    if needed > available:
        raise UserError(
            f"the model has {parameters.total:,} parameters (num_layers={run.model.num_layers}, "
            f"hidden_size={run.model.hidden_size}, vocab_size={run.model.vocab_size}), of which a rank's weights, "
            f"gradients and optimizer states take {gib(needed)}, and {where} has {gib(available)}; make the model "
            "smaller, or divide it over more ranks (tensor, pipeline or expert parallelism, use_distributed_optimizer)"
        )
