"""What the mixture-of-experts fields of ``TransformerConfig`` say: one record, and the checks that need no layout.

The fields are Megatron-Core's and stay in ``ModelConfig.transformer``; a test compares the defaults below with its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from phd_megatron.config.plain import Plain
from phd_megatron.config.schema import ModelConfig, RunConfig

DEFAULTS: dict[str, Plain] = {
    "moe_router_topk": 2,
    "moe_layer_freq": 1,
    "moe_ffn_hidden_size": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_shared_expert_gate": False,
    "moe_shared_expert_overlap": False,
    "moe_token_dispatcher_type": "allgather",
    "moe_flex_dispatcher_backend": "deepep",
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.0,
    "moe_z_loss_coeff": None,
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": False,
    "moe_router_enable_expert_bias": False,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_topk_scaling_factor": None,
    "moe_router_dtype": None,
    "moe_expert_capacity_factor": None,
    "moe_pad_expert_input_to_capacity": False,
}
"""Megatron-Core's defaults of the fields that are read here."""

UNCOUNTED = {
    "moe_expert_capacity_factor": "how many rows are dropped is not known before",
    "moe_router_padding_for_quantization": "how many rows are added is not known before",
    "moe_permute_fusion": "Transformer Engine's permutation comes with Megatron-Core's dispatcher, which reads counts",
    "moe_shared_expert_overlap": "it comes with Megatron-Core's dispatcher, which reads how many rows there are",
}
"""Fields with which the host reads how many rows an expert gets, also where a rank has all experts; and why."""

LOSSES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}
"""Load-balancing type -> the name of its loss in logs, as Megatron-Core's."""


def moe_value(model: ModelConfig, name: str) -> Any:
    """A mixture-of-experts field of the run, or Megatron-Core's default."""
    value = model.transformer.get(name)
    return DEFAULTS[name] if value is None else value


def layer_pattern(frequency: int | list[int], num_layers: int) -> tuple[bool, ...]:
    """Whether each layer has experts: every ``frequency``-th one from the first, or as a list of 0 and 1 says."""
    if isinstance(frequency, int):
        return tuple(index % frequency == 0 for index in range(num_layers))
    return tuple(map(bool, frequency))


SAID_BY_MOE = frozenset(
    {
        "num_moe_experts",
        "moe_router_topk",
        "moe_layer_freq",
        "moe_ffn_hidden_size",
        "moe_shared_expert_intermediate_size",
        "moe_shared_expert_gate",
        "moe_router_score_function",
        "moe_router_pre_softmax",
        "moe_router_enable_expert_bias",
        "moe_router_num_groups",
        "moe_router_group_topk",
        "moe_router_topk_scaling_factor",
    }
)
"""``TransformerConfig`` fields whose meaning for a model a :class:`MoE` holds."""


@dataclass(frozen=True)
class MoE:
    """Sizes of a resolved model with experts.

    Attributes:
        experts: of each MoE layer.
        topk: experts that compute a row.
        layers: whether each layer has experts.
        ffn_hidden_size: width of one expert's FFN branch.
        shared_hidden_size: width of all shared experts together; 0 without.
        shared_gate: whether a sigmoid gate scales the shared experts' output.
        score_function: ``softmax`` or ``sigmoid`` of the router's logits.
        pre_softmax: softmax over all experts instead of the chosen ones.
        expert_bias: a bias takes part in the choice of experts, and not in their weights.
        groups, group_topk: experts are chosen from the best ``group_topk`` of so many groups; None for one group.
        scaling: what the weights of the chosen experts are multiplied by.
        router_dtype: the type that the router computes in, such as ``fp32``; None for the model's.
    """

    experts: int
    topk: int
    layers: tuple[bool, ...]
    ffn_hidden_size: int
    shared_hidden_size: int = 0
    shared_gate: bool = False
    score_function: str = "softmax"
    pre_softmax: bool = False
    expert_bias: bool = False
    groups: int | None = None
    group_topk: int | None = None
    scaling: float = 1.0
    router_dtype: str | None = None

    @classmethod
    def from_model(cls, model: ModelConfig) -> MoE | None:
        """From a resolved configuration; ``None`` for a dense model."""
        experts = model.transformer.get("num_moe_experts")
        if experts is None:
            return None
        assert model.num_layers and model.ffn_hidden_size  # resolved
        return cls(
            experts=experts,
            topk=moe_value(model, "moe_router_topk"),
            layers=layer_pattern(moe_value(model, "moe_layer_freq"), model.num_layers),
            ffn_hidden_size=moe_value(model, "moe_ffn_hidden_size") or model.ffn_hidden_size,
            shared_hidden_size=moe_value(model, "moe_shared_expert_intermediate_size") or 0,
            shared_gate=moe_value(model, "moe_shared_expert_gate"),
            score_function=moe_value(model, "moe_router_score_function"),
            pre_softmax=moe_value(model, "moe_router_pre_softmax"),
            expert_bias=moe_value(model, "moe_router_enable_expert_bias"),
            groups=moe_value(model, "moe_router_num_groups"),
            group_topk=moe_value(model, "moe_router_group_topk"),
            scaling=moe_value(model, "moe_router_topk_scaling_factor") or 1.0,
            router_dtype=moe_value(model, "moe_router_dtype"),
        )


def stacked_experts(config: RunConfig) -> bool:
    """Whether the experts of a rank have one weight, which is multiplied in bfloat16 beside FP8 layers too.

    Others are Transformer Engine's or computed one after another, in the precision of the layers.
    """
    by_muon = config.optimizer.optimizer == "muon"  # on the matrices of single experts
    return config.model.moe_experts_backend in ("auto", "grouped_mm") and not by_muon


def router_losses(model: ModelConfig) -> list[str]:
    """Names in the log of the losses that every router of this model has, in a fixed order."""
    kinds, coefficients = (moe_value(model, n) for n in ("moe_router_load_balancing_type", "moe_aux_loss_coeff"))
    pairs = zip(kinds, coefficients, strict=True) if isinstance(kinds, list) else [(kinds, coefficients)]
    names = [LOSSES[kind] for kind, coefficient in pairs if kind in LOSSES and coefficient]
    return [*names, "z_loss"] if moe_value(model, "moe_z_loss_coeff") else names


def overlap_problems(config: RunConfig) -> Iterator[str]:
    """Why transfers of experts cannot be overlapped with other micro-batches' products, one sentence each."""
    extra, parallel = config.model.transformer, config.parallel
    name = "overlap_moe_expert_parallel_comm"
    if not extra.get(name):
        return
    if parallel.expert_model_parallel_size == 1:
        yield (f"{name}=True with expert_model_parallel_size=1: nothing is sent; leave it out, or spread the experts")
    if moe_value(config.model, "moe_token_dispatcher_type") == "allgather":
        yield (
            f"{name}=True with moe_token_dispatcher_type=allgather: Megatron-Core overlaps the others' transfers; use "
            "alltoall or flex"
        )
    if not (config.training.bf16 or config.training.fp16):
        yield f"{name}=True with float32 parameters: Megatron-Core has it for half precision alone; set bf16"
    if moe_value(config.model, "moe_shared_expert_overlap"):
        yield f"{name}=True with moe_shared_expert_overlap=True: both would fill the same gap; leave one of them out"
    if extra.get("recompute_granularity") == "full":
        yield (
            f"{name}=True with recompute_granularity=full: layers are run in pieces, and whole ones cannot be computed "
            "again; use recompute_granularity selective"
        )
    if config.logging.log_layer_statistics:
        yield (
            f"{name}=True with log_layer_statistics={config.logging.log_layer_statistics}: layers are run in pieces, "
            "so nothing can look at what enters and leaves them; leave one of them out"
        )


def moe_problems(model: ModelConfig) -> Iterator[str]:
    """Everything wrong with the experts' values themselves, with value, reason and cure."""
    experts = model.transformer.get("num_moe_experts")
    if experts is None:
        return
    yield from _ranges(model, experts)
    yield from _routing(model)
    yield from _balancing(model)
    if model.add_bias_linear:
        yield (
            "add_bias_linear=True with num_moe_experts: experts have no biases here; turn it off (add_qkv_bias stays "
            "available)"
        )


def _ranges(model: ModelConfig, experts: int) -> Iterator[str]:
    topk = moe_value(model, "moe_router_topk")
    if experts < 1:
        yield f"num_moe_experts={experts} is out of range; use a value at least 1, or leave it out for a dense model"
    elif not 1 <= topk <= experts:
        yield f"moe_router_topk={topk} of num_moe_experts={experts}: use a value from 1 to {experts}"
    for name in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"):
        value = moe_value(model, name)
        if value is not None and value < 1:
            yield f"{name}={value} is out of range; use a value at least 1, or leave it out"
    shared = moe_value(model, "moe_shared_expert_intermediate_size")
    for name in ("moe_shared_expert_gate", "moe_shared_expert_overlap"):
        if moe_value(model, name) and shared is None:
            yield f"{name}=True without shared experts; set moe_shared_expert_intermediate_size, or leave it out"
    if moe_value(model, "moe_shared_expert_overlap") and moe_value(model, "moe_token_dispatcher_type") != "alltoall":
        yield (
            "moe_shared_expert_overlap=True overlaps the alltoall dispatcher's transfers only; set "
            "moe_token_dispatcher_type to alltoall, or leave it out"
        )
    capacity = moe_value(model, "moe_expert_capacity_factor")
    if capacity is not None and capacity <= 0:
        yield f"moe_expert_capacity_factor={capacity} leaves no room; use a value above 0, or leave it out for dropless"
    if capacity is None and moe_value(model, "moe_pad_expert_input_to_capacity"):
        yield "moe_pad_expert_input_to_capacity=True without a capacity; set moe_expert_capacity_factor"
    frequency = moe_value(model, "moe_layer_freq")
    if isinstance(frequency, int):
        if frequency < 1:
            yield f"moe_layer_freq={frequency} is out of range; use a value at least 1"
    elif model.num_layers and (len(frequency) != model.num_layers or not set(frequency) <= {0, 1}):
        yield (
            f"moe_layer_freq={frequency} does not say for each of num_layers={model.num_layers} layers whether it has "
            "experts; give as many of 1 (experts) and 0 (dense)"
        )
    elif not any(frequency):
        yield f"moe_layer_freq={frequency} leaves no layer with experts; leave num_moe_experts out instead"


def _routing(model: ModelConfig) -> Iterator[str]:
    score, topk = moe_value(model, "moe_router_score_function"), moe_value(model, "moe_router_topk")
    if topk == 1 and score == "softmax" and not moe_value(model, "moe_router_pre_softmax"):
        yield (
            "moe_router_topk=1 with a softmax over the chosen expert alone gives every expert the weight 1 and the "
            "router no gradient; set moe_router_pre_softmax"
        )
    if moe_value(model, "moe_router_enable_expert_bias") and score != "sigmoid":
        yield (
            f"moe_router_enable_expert_bias=True with moe_router_score_function={score}: the bias is defined for "
            "sigmoid scores; set moe_router_score_function to sigmoid"
        )
    groups, chosen = moe_value(model, "moe_router_num_groups"), moe_value(model, "moe_router_group_topk")
    if (groups is None) != (chosen is None):
        yield (
            f"moe_router_num_groups={groups} and moe_router_group_topk={chosen} belong together; set both or neither"
        )
    elif groups is not None and chosen is not None:
        experts = model.transformer["num_moe_experts"]
        if groups < 1 or experts % groups or not 1 <= chosen <= groups or topk % chosen:
            yield (
                f"moe_router_num_groups={groups} and moe_router_group_topk={chosen} do not fit "
                f"num_moe_experts={experts} and moe_router_topk={topk}: groups divide the experts, and the chosen "
                "groups, at most all, divide topk"
            )
        elif topk > experts // groups * chosen:
            yield (
                f"moe_router_topk={topk} is more than the {experts // groups * chosen} experts of "
                f"moe_router_group_topk={chosen} groups; choose more groups"
            )


def _balancing(model: ModelConfig) -> Iterator[str]:
    kinds, coefficients = (moe_value(model, n) for n in ("moe_router_load_balancing_type", "moe_aux_loss_coeff"))
    pair = f"moe_router_load_balancing_type={kinds!r} and moe_aux_loss_coeff={coefficients!r}"
    if isinstance(kinds, list) != isinstance(coefficients, list) or (
        isinstance(kinds, list) and len(kinds) != len(coefficients)
    ):
        yield f"{pair} do not match; give one coefficient for each type"
        return
    known = {*LOSSES, "none", "sinkhorn"}  # sinkhorn is refused by name
    listed = list(zip(kinds, coefficients, strict=True)) if isinstance(kinds, list) else [(kinds, coefficients)]
    for kind, coefficient in listed:
        if kind not in known:
            yield f"moe_router_load_balancing_type={kind!r} is not known; use {', '.join([*LOSSES, 'none'])}"
        elif coefficient < 0:
            yield f"moe_aux_loss_coeff={coefficient} rewards imbalance; use a value at least 0"
        elif coefficient and kind not in LOSSES:
            yield f"{pair}: {kind} has no loss to weigh; use {', '.join(LOSSES)}, or set the coefficient to 0"
    if isinstance(kinds, list) and len(set(kinds)) != len(kinds):
        yield f"moe_router_load_balancing_type={kinds!r} names a type twice; name each once"
    z_loss = moe_value(model, "moe_z_loss_coeff")
    if z_loss is not None and z_loss < 0:
        yield f"moe_z_loss_coeff={z_loss} rewards large logits; use a value at least 0"
