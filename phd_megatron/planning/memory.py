"""Memory of one rank, estimated.

Convention: weights, gradients and AdamW states are counted exactly; activations are what a plain layer keeps for its
backward pass, without recomputation unless the run recomputes whole layers. What the allocator wastes, communication
buffers, workspaces and the framework itself are not counted: leave a fifth of the device free. The estimate is of the
pipeline stage that needs most. It has been compared with tensors saved for backward on a CPU, not with a GPU's peak.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from phd_megatron.config.architecture import Architecture, architecture_of
from phd_megatron.config.deepspeed import offloads, zero_stage
from phd_megatron.config.schema import RunConfig
from phd_megatron.planning.in_flight import most_kept
from phd_megatron.planning.parameters import Parameters
from phd_megatron.runtime.parallel_dims import ParallelDims


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.activations


def estimate_memory(run: RunConfig, parameters: Parameters, padded_vocab_size: int, dims: ParallelDims) -> Memory:
    """Memory of the rank that needs most, for a resolved run in a checked layout."""
    assert run.model.num_layers is not None
    stages = dims.split.layers(run.model.num_layers)
    chunks = len(stages) // dims.pp
    held = [_stage(run, parameters, padded_vocab_size, dims, stages, stage, chunks) for stage in range(dims.pp)]
    return max(held, key=lambda memory: memory.total)


def _stage(
    run: RunConfig,
    parameters: Parameters,
    padded_vocab_size: int,
    dims: ParallelDims,
    stages: tuple[int, ...],
    stage: int,
    chunks: int,
) -> Memory:
    starts = [sum(stages[:number]) for number in range(len(stages))]
    mine = range(stage, len(stages), dims.pp)  # chunk c of stage p is number c * PP + p
    held = [range(starts[number], starts[number] + stages[number]) for number in mine]
    layers = [parameters.layers[index] for chunk in held for index in chunk]
    first, last = stage == 0, stage == dims.pp - 1
    head = parameters.head or parameters.embedding  # tied weights are copied to the last stage
    vocabulary = parameters.embedding * first + (0 if first and last and not parameters.head else head * last)
    dense = (sum(layer.dense for layer in layers) + vocabulary) / dims.tp
    outside = (parameters.embed_norm + parameters.copy_embedding) * first + parameters.final_norm * last
    dense += sum(layer.whole for layer in layers) + outside
    experts = sum(layer.experts for layer in layers) / (dims.ep * dims.etp)

    half = run.training.bf16 or run.training.fp16
    element = 2 if half else 4
    gradient = 2 if half and not run.training.accumulate_allreduce_grads_in_fp32 else 4
    # First and second moment, and fp32 main parameters: of half-precision ones, and with DeepSpeed of all.
    state = 12 if half or run.parallel.deepspeed else 8
    one_moment = 0.0  # parameters of which muon keeps the first alone; it leaves norms and vocabulary to AdamW
    if run.optimizer.optimizer == "muon":
        one_moment = sum(layer.dense for layer in layers) / dims.tp + experts
    shards, expert_shards = 1, 1
    if run.parallel.use_distributed_optimizer:
        shards = dims.dp * dims.cp
        expert_shards = max(1, dims.world_size // (dims.etp * dims.ep * dims.pp))
    rows = run.training.micro_batch_size * run.model.seq_length / dims.cp
    a = architecture_of(run.model)
    every = [[_activations(a, index, dims, element) for index in chunk] for chunk in held]
    of_chunks, at_once = [sum(chunk) for chunk in every], 0.0
    if run.model.transformer.get("recompute_granularity") == "full":
        of_chunks = [len(chunk) * element * a.hidden_size / (dims.tp if dims.sp else 1) for chunk in held]
        at_once = max((layer for chunk in every for layer in chunk), default=0.0)
    kept = most_kept(of_chunks, stage, dims.pp, **_order(run, dims)) + at_once
    activations = rows * a.policy.repeat * kept
    if last:
        # Logits; Megatron-Core's loss keeps their fp32 softmax and gradient too, ours on a GPU overwrites them.
        ours = half and not run.model.transformer.get("cross_entropy_loss_fusion")
        activations += rows * padded_vocab_size / dims.tp * (element if ours else element + 8)
    memory = Memory(
        weights=math.ceil((dense + experts) * element),
        gradients=math.ceil((dense + experts) * gradient),
        optimizer=math.ceil(state * (dense / shards + experts / expert_shards) - 4 * one_moment),
        activations=math.ceil(activations),
    )
    return _under_zero(memory, run, dims.dp * dims.cp) if run.parallel.deepspeed else memory


def _order(run: RunConfig, dims: ParallelDims) -> dict[str, int]:
    """Micro-batches of a step, where a global batch is known, and how they go through the chunks of a stage."""
    known = run.training.global_batch_size is not None
    return {
        "count": max(1, dims.microbatches(run.training)) if known else 4 * (dims.pp + dims.chunk_microbatches),
        "group": dims.chunk_microbatches,
        "ahead": int(bool(run.model.transformer.get("overlap_moe_expert_parallel_comm"))),
    }


def _under_zero(memory: Memory, run: RunConfig, ranks: int) -> Memory:
    """What is left on the device where so many ranks divide it; buckets and fetched parameters are not counted."""
    stage, states_on_host = zero_stage(run), offloads(run, "offload_optimizer")
    weights = math.ceil(memory.weights / ranks) if stage == 3 else memory.weights
    gradients = math.ceil(memory.gradients / ranks) if stage > 1 else memory.gradients
    return replace(
        memory,
        weights=0 if offloads(run, "offload_param") else weights,
        gradients=0 if states_on_host and stage > 1 else gradients,
        optimizer=0 if states_on_host else math.ceil(memory.optimizer / ranks),
    )


def _activations(a: Architecture, index: int, dims: ParallelDims, element: int) -> float:
    """Bytes that one row keeps in the layer with this 0-based index."""
    stream = a.hidden_size / (dims.tp if dims.sp else 1)
    query, key = a.heads * a.head_dim, a.groups * a.head_dim
    # query, key, value; query and key again after RoPE; context and its log-sum-exp
    attention = (query + 2 * key) + (query + key) + query + a.heads * 4 / element
    # input and output of two norms; what the FFN reads and the two sums are among them
    return element * (4 * stream + attention / dims.tp + _ffn(a, index, dims))


def _ffn(a: Architecture, index: int, dims: ParallelDims) -> float:
    """Elements that one row keeps in the FFN: up and gate projections and the activation.

    Experts keep the rows that are routed to them, by an even router, once more and sorted: each rank of TP those of its
    part of the sequence, and each rank of the experts' own TP those of all of its ranks. Without a gate they keep the
    activation before and after the router's weight. Those of ``moe_experts_backend`` te and sequential keep both with a
    gate too; that is not counted.
    """
    widths, moe = 3 if a.gated else 2, a.moe
    if moe is None or not moe.layers[index]:
        return widths * a.ffn_hidden_size / dims.tp
    # Training with experts divides the sequence over TP.
    routed = moe.topk * (dims.etp * a.hidden_size + 3 * moe.ffn_hidden_size)
    return (routed + widths * moe.shared_hidden_size + moe.experts) / dims.tp
