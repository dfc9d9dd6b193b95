"""What a run costs, before it is started: parameters, operations, memory of a rank, hours of a device."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from phd_megatron.config.architecture import padded_vocab_size
from phd_megatron.config.plain import Json
from phd_megatron.config.schema import RunConfig
from phd_megatron.errors import UserError, raise_all
from phd_megatron.planning.flops import forward_flops, mean_document_flops
from phd_megatron.planning.memory import Memory, estimate_memory
from phd_megatron.planning.parameters import count_parameters
from phd_megatron.planning.peak import device_hours
from phd_megatron.runtime.fp8 import size_problems
from phd_megatron.runtime.parallel_dims import ParallelDims


@dataclass(frozen=True)
class RunPlan:
    """Costs of one run. Tokens are original ones; FLOPs are those of a training step, see :mod:`..planning.flops`."""

    parameters: int
    active_parameters: int
    non_embedding_parameters: int
    samples: int
    tokens: int
    processed_tokens: int
    flops_per_token: float
    flops: float
    ranks: int
    memory: Memory  #: of the rank that needs most

    def device_hours(self, peak: float, mfu: float) -> float:
        """Hours of one device at a share ``mfu`` of ``peak`` TFLOP/s, all ranks' together."""
        return device_hours(self.flops, peak, mfu)

    def as_dict(self) -> Json:
        """Plain data for a file."""
        return asdict(self)


def plan_run(run: RunConfig, samples: int, world_size: int, mean_document_length: float | None = None) -> RunPlan:
    """Plan a resolved run of so many samples, for whatever machine.

    Args:
        mean_document_length: in tokens, of documents that are kept apart; None counts one document a sample, which is
            the most that attention can have to do.

    Raises:
        UserError: for a mean length where documents are not kept apart; when the vocabulary is not known, the layout
            does not fit, or FP8 cannot take a product's size.
    """
    model = run.model
    if model.vocab_size is None:
        raise UserError("vocab_size is not known; set it, or name the tokenizer")
    vocabulary = padded_vocab_size(model.vocab_size, model.make_vocab_size_divisible_by)
    dims = ParallelDims.from_config(run.parallel, world_size)
    dims.validate(model, run.training)
    raise_all([*size_problems(run, dims)])
    parameters = count_parameters(model, vocabulary)
    per_sample: float = forward_flops(model, vocabulary).training
    if mean_document_length is not None:
        if not run.data.reset_attention_mask:
            raise UserError(
                f"--mean-document-length {mean_document_length:g}: attention goes across documents without "
                "reset_attention_mask, so their length changes nothing; add --reset-attention-mask, or leave it out"
            )
        per_sample = mean_document_flops(model, vocabulary, mean_document_length)
    return RunPlan(
        parameters=parameters.total,
        active_parameters=parameters.active,
        non_embedding_parameters=parameters.non_embedding,
        samples=samples,
        tokens=samples * model.seq_length,
        processed_tokens=samples * model.seq_length * model.phd_repeat,
        flops_per_token=per_sample / model.seq_length,
        flops=float(per_sample) * samples,
        ranks=world_size,
        memory=estimate_memory(run, parameters, vocabulary, dims),
    )
