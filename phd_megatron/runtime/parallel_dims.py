"""The layout of a run over its ranks, checked against the model and the batch before anything is built."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from phd_megatron.config.architecture import kv_policy
from phd_megatron.config.schema import ModelConfig, ParallelConfig, TrainingConfig
from phd_megatron.errors import UserError
from phd_megatron.runtime.pipeline_split import PipelineSplit


def expert_tensor_size(parallel: ParallelConfig) -> int:
    """TP of the experts: that of everything else, unless it is given."""
    given = parallel.expert_tensor_parallel_size
    return parallel.tensor_model_parallel_size if given is None else given


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of the parallel groups; ``dp`` is what remains of the world size."""

    world_size: int
    tp: int = 1  #: tensor
    pp: int = 1  #: pipeline
    vpp: int | None = None  #: model chunks per pipeline rank
    cp: int = 1  #: context
    ep: int = 1  #: expert
    etp: int = 1  #: tensor size of the experts
    sp: bool = False  #: sequence parallelism within the tensor group
    split: PipelineSplit = dataclasses.field(default=PipelineSplit(), compare=False)  #: layers of each stage
    vpp_group: int | None = None  #: micro-batches that a chunk runs one after the other; default the pipeline size
    notes: tuple[str, ...] = dataclasses.field(default=(), compare=False)  #: what was changed and why, for the log

    @classmethod
    def from_config(cls, parallel: ParallelConfig, world_size: int) -> ParallelDims:
        """Build and check the sizes alone; :meth:`validate` checks them against a model.

        Raises:
            UserError: a size below 1, or a product that does not divide the world size.
        """
        notes = []
        tp = parallel.tensor_model_parallel_size
        sp = parallel.sequence_parallel
        if sp and tp == 1:
            sp = False
            notes.append(
                "sequence_parallel is off: it splits over the tensor group, and tensor_model_parallel_size is 1"
            )
        _check_positive({"virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size})
        _check_positive({"pipeline_model_parallel_size": parallel.pipeline_model_parallel_size})
        split = PipelineSplit.from_config(parallel)
        dims = cls(
            world_size=world_size,
            tp=tp,
            pp=parallel.pipeline_model_parallel_size,
            vpp=split.vpp if split.vpp > 1 else None,
            cp=parallel.context_parallel_size,
            ep=parallel.expert_model_parallel_size,
            etp=expert_tensor_size(parallel),
            sp=sp,
            split=split,
            vpp_group=parallel.microbatch_group_size_per_vp_stage,
            notes=tuple(notes),
        )
        dims._check_sizes()
        dims._check_interleaving(parallel)
        return dims

    @property
    def chunk_microbatches(self) -> int:
        """Micro-batches that go through a model chunk before the next chunk has its turn."""
        return self.vpp_group or self.pp

    def microbatches(self, training: TrainingConfig) -> int:
        """Of a step of a whole global batch."""
        assert training.global_batch_size is not None
        return training.global_batch_size // (training.micro_batch_size * self.dp)

    @property
    def model_parallel(self) -> int:
        """Ranks that hold one copy of the model: tensor x pipeline x context."""
        return self.tp * self.pp * self.cp

    @property
    def dp(self) -> int:
        """Ranks that read different samples."""
        return self.world_size // self.model_parallel

    def describe(self) -> str:
        """Sizes on one line; those of 1 are left out, except data parallelism."""
        sizes = {"TP": self.tp, "PP": self.pp, "VPP": self.vpp or 1, "CP": self.cp, "EP": self.ep}
        parts = [f"{name} {size}" for name, size in sizes.items() if size > 1]
        if self.etp != self.tp:
            parts.append(f"ETP {self.etp}")
        if self.sp:
            parts.append("SP")
        return ", ".join([*parts, f"DP {self.dp}"])

    def validate(self, model: ModelConfig, training: TrainingConfig) -> None:
        """Check that the model and the batch can be laid out so. Fields that are still None are not checked.

        Raises:
            UserError: with the numbers that do not fit and what to change.
        """
        self._check_width(model)
        self._check_depth(model)
        self._check_sequence(model)
        self._check_batch(training)
        self._check_experts(model)

    def data_parallel_product(self) -> str:
        """How ``dp`` follows from the world size, for messages."""
        return f"world size {self.world_size} / {self._product()} = data-parallel size {self.dp}"

    def _product(self) -> str:
        return f"(tensor {self.tp} x pipeline {self.pp} x context {self.cp})"

    def _check_sizes(self) -> None:
        sizes = {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "context_parallel_size": self.cp,
            "expert_model_parallel_size": self.ep,
            "expert_tensor_parallel_size": self.etp,
        }
        _check_positive(sizes)
        product = self.model_parallel
        if self.world_size % product:
            usable = [n for n in range(product, self.world_size + product, product)][-2:]
            raise UserError(
                f"tensor {self.tp} x pipeline {self.pp} x context {self.cp} = {product} does not divide world size "
                f"{self.world_size}: every copy of the model needs {product} ranks; start "
                f"{' or '.join(map(str, usable))} ranks, or change one of these sizes"
            )
        if self.vpp is not None and self.pp == 1:
            raise UserError(
                f"virtual_pipeline_model_parallel_size is {self.vpp} with pipeline_model_parallel_size 1: there is no "
                "pipeline to interleave; raise the pipeline size or set the virtual size to null"
            )
        experts = self.etp * self.ep * self.pp
        if self.world_size % experts:
            raise UserError(
                f"expert tensor {self.etp} x expert {self.ep} x pipeline {self.pp} = {experts} does not divide world "
                f"size {self.world_size}: experts are spread over tensor, context and data ranks together; change "
                "expert_model_parallel_size or expert_tensor_parallel_size"
            )

    def _check_width(self, model: ModelConfig) -> None:
        heads, groups = model.num_attention_heads, model.num_query_groups
        if heads is not None and heads % self.tp:
            raise UserError(
                f"num_attention_heads {heads} is not divisible by tensor_model_parallel_size {self.tp}: each tensor "
                f"rank holds whole heads; use a size that divides {heads}"
            )
        if groups is not None and groups % self.tp and self.tp % groups:
            raise UserError(
                f"num_query_groups {groups} and tensor_model_parallel_size {self.tp} do not divide one another: a "
                "tensor rank holds whole KV heads, or a KV head is shared by whole ranks; change one of them"
            )
        if model.ffn_hidden_size is not None and model.ffn_hidden_size % self.tp:
            raise UserError(
                f"ffn_hidden_size {model.ffn_hidden_size} is not divisible by tensor_model_parallel_size {self.tp}; "
                f"use {_round_up(model.ffn_hidden_size, self.tp)} or another tensor size"
            )
        if model.hidden_size is not None and model.hidden_size % self.tp:
            raise UserError(
                f"hidden_size {model.hidden_size} is not divisible by tensor_model_parallel_size {self.tp}; "
                "change one of them"
            )
        if model.vocab_size is not None:
            multiple = model.make_vocab_size_divisible_by
            padded = _round_up(model.vocab_size, multiple)
            if padded % self.tp:
                raise UserError(
                    f"the padded vocabulary {padded} (vocab_size {model.vocab_size} up to a multiple of "
                    f"make_vocab_size_divisible_by {multiple}) is not divisible by tensor_model_parallel_size "
                    f"{self.tp}; set make_vocab_size_divisible_by to {math.lcm(multiple, self.tp)}"
                )

    def _check_interleaving(self, parallel: ParallelConfig) -> None:
        if self.vpp is None:
            users = ("overlap_p2p_comm", "overlap_p2p_comm_warmup_flush", "microbatch_group_size_per_vp_stage")
            for name in users:
                if value := getattr(parallel, name):
                    raise UserError(
                        f"{name} is {value} without virtual pipeline stages, which alone use it; set "
                        "virtual_pipeline_model_parallel_size, or leave it out"
                    )
        elif self.pp == 2 and parallel.overlap_p2p_comm is False:
            raise UserError(
                "overlap_p2p_comm is False with virtual stages on pipeline_model_parallel_size 2: a rank then sends "
                "activations and gradients to one and the same neighbour in one batch, and they cross; leave it out "
                "(true), or use 3 or more pipeline ranks"
            )
        elif parallel.overlap_p2p_comm_warmup_flush and parallel.overlap_p2p_comm is False:
            raise UserError(
                "overlap_p2p_comm_warmup_flush is True with overlap_p2p_comm False: it extends that overlap; leave "
                "overlap_p2p_comm out"
            )

    def _check_depth(self, model: ModelConfig) -> None:
        if model.num_layers is not None:
            self.split.layers(model.num_layers)

    def _check_sequence(self, model: ModelConfig) -> None:
        slices = 2 * self.cp if self.cp > 1 else 1
        share = slices * (self.tp if self.sp else 1)
        if model.seq_length % share:
            why = [f"context parallelism cuts 2 x {self.cp} slices"] if self.cp > 1 else []
            why += [f"sequence parallelism splits over tensor {self.tp}"] if self.sp else []
            raise UserError(
                f"seq_length {model.seq_length} is not divisible by {share}: {' and '.join(why)}; use "
                f"{_round_up(model.seq_length, share)}"
            )
        if self.cp > 1:
            try:
                kv_policy(model).context_parallel_slices(model.seq_length, self.cp, 0)
            except ValueError as error:
                raise UserError(str(error)) from None

    def _check_batch(self, training: TrainingConfig) -> None:
        micro, batch = training.micro_batch_size, training.global_batch_size
        if batch is None:
            return
        step = micro * self.dp
        if batch % step:
            raise UserError(
                f"global_batch_size {batch} is not divisible by micro_batch_size {micro} x data-parallel size "
                f"{self.dp} = {step} ({self.data_parallel_product()}); use {_round_up(batch, step)} or change one of "
                "them"
            )
        for name, value in zip(("start", "increment"), training.rampup_batch_size or (), strict=False):
            if value % step:
                raise UserError(
                    f"rampup_batch_size {name} {value} is not divisible by micro_batch_size {micro} x data-parallel "
                    f"size {self.dp} = {step}; use {_round_up(value, step)}"
                )
        if self.vpp is not None:
            start, increment, _ = training.rampup_batch_size or (batch, batch, 0)
            for size in {*range(start, batch, increment), batch}:
                self._check_interleaved_batch(size, step)

    def _check_interleaved_batch(self, batch: int, step: int) -> None:
        """Megatron-Core's rule: whole groups of micro-batches, and a rest is not smaller than the pipeline."""
        count, group = batch // step, self.chunk_microbatches
        if group == self.pp and count % group:
            raise UserError(
                f"{count} micro-batches per step (global_batch_size {batch} / {step}) are not a multiple of "
                f"pipeline_model_parallel_size {self.pp}, which interleaved stages need; use "
                f"global_batch_size {_round_up(batch, step * self.pp)}"
            )
        if not self.pp <= group <= count or 0 < count % group < self.pp:
            raise UserError(
                f"microbatch_group_size_per_vp_stage {group} does not fit {count} micro-batches per step "
                f"(global_batch_size {batch} / {step}) and pipeline_model_parallel_size {self.pp}: it lies between the "
                f"two, and a last group that is smaller still has {self.pp}; leave it out for {self.pp}"
            )

    def _check_experts(self, model: ModelConfig) -> None:
        experts: int | None = model.transformer.get("num_moe_experts")
        if experts is None:
            if self.ep > 1:
                raise UserError(
                    f"expert_model_parallel_size is {self.ep} but the model has no experts; set num_moe_experts or "
                    "leave the expert size at 1"
                )
            return
        if int(experts) % self.ep:
            raise UserError(
                f"num_moe_experts {experts} is not divisible by expert_model_parallel_size {self.ep}; change one of "
                "them"
            )
        for name, kind, share in (
            ("moe_ffn_hidden_size", "expert_tensor_parallel_size", self.etp),
            ("moe_shared_expert_intermediate_size", "tensor_model_parallel_size", self.tp),
        ):
            size: int | None = model.transformer.get(name)
            if size is not None and size % share:
                raise UserError(f"{name} {size} is not divisible by {kind} {share}; use {_round_up(size, share)}")
        if self.tp > 1 and not self.sp:
            raise UserError(
                f"experts with tensor_model_parallel_size {self.tp} need sequence_parallel in training; turn it on"
            )


def _check_positive(sizes: Mapping[str, int | None]) -> None:
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise UserError(f"{name} is {size}: a group has at least one rank; set it to 1 or more")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
