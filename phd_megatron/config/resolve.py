"""Fill in what a configuration leaves to be derived, and refuse what cannot be.

Needs no process group. ``global_batch_size`` (needs the data-parallel size) and ``vocab_size`` (needs the tokenizer)
stay as they are.
"""

from __future__ import annotations

from phd_megatron.config.architecture import NEEDED, complete
from phd_megatron.config.catalog import fields
from phd_megatron.config.cuda_graph import switched_off_graph
from phd_megatron.config.moe import router_losses
from phd_megatron.config.precision import switched_off, without_padding
from phd_megatron.config.schema import ModelConfig, ParallelConfig, RunConfig
from phd_megatron.config.unsupported import refusals
from phd_megatron.config.validate import problems
from phd_megatron.errors import UserError, raise_all

EVAL_INTERVAL = 1000  # steps, where neither eval_interval nor evals_per_run is given


def resolve(config: RunConfig) -> list[str]:
    """Complete ``config`` in place; a second call changes nothing.

    Returns:
        What was derived and is worth telling, one line each.

    Raises:
        UserError: with every problem found: missing architecture, values out of range, features not available.
    """
    switched_off_notes = switched_off(config.model) + switched_off_graph(config.model) + without_padding(config)
    raise_all(refusals(config))
    sharding_notes = _resolve_sharding(config)
    raise_all(
        [
            f"{name} is not set; give --{name.replace('_', '-')} N, or `{name}: N` below `model:`"
            for name in NEEDED
            if getattr(config.model, name) is None
        ]
    )
    raise_all(problems(config))
    notes = [*complete(config.model), *_resolve_stages(config), *warnings(config)]
    if config.training.eval_interval is None and config.training.evals_per_run is None:
        config.training.eval_interval = EVAL_INTERVAL
    raise_all(problems(config))
    return switched_off_notes + sharding_notes + notes


def _resolve_sharding(config: RunConfig) -> list[str]:
    """Whether data-parallel ranks share the optimizer's states: flat pieces, of which AdamW asks no more."""
    parallel, has_muon = config.parallel, config.optimizer.optimizer == "muon"
    if parallel.use_distributed_optimizer is not None:
        return []
    if parallel.deepspeed:
        parallel.use_distributed_optimizer = False
        return ["use_distributed_optimizer=False: DeepSpeed's ZeRO divides the states"]
    parallel.use_distributed_optimizer = not has_muon
    if not has_muon:
        return []
    return ["use_distributed_optimizer=False: muon works on whole matrices, so every data-parallel rank has all states"]


def _resolve_stages(config: RunConfig) -> list[str]:
    """``num_layers_per_virtual_pipeline_stage`` to the number of chunks, as Megatron-LM does."""
    parallel, layers = config.parallel, config.model.num_layers
    per_chunk, stages = parallel.num_layers_per_virtual_pipeline_stage, parallel.pipeline_model_parallel_size
    if per_chunk is None:
        return []
    assert layers is not None  # checked by resolve
    if layers % (stages * per_chunk):
        raise UserError(
            f"num_layers_per_virtual_pipeline_stage={per_chunk}: num_layers={layers} is not a multiple of "
            f"pipeline_model_parallel_size={stages} x {per_chunk}; use a number that divides, or "
            "virtual_pipeline_model_parallel_size with an explicit split"
        )
    chunks = layers // (stages * per_chunk)
    parallel.num_layers_per_virtual_pipeline_stage = None
    parallel.virtual_pipeline_model_parallel_size = chunks
    return [f"virtual_pipeline_model_parallel_size={chunks}: {layers} layers / ({stages} stages x {per_chunk})"]


def warnings(config: RunConfig) -> list[str]:
    """What is legal and likely to surprise."""
    found = []
    model, extra = config.model, config.model.transformer
    if model.phd_repeat > 1 and extra.get("moe_expert_capacity_factor") is not None:
        found.append(
            f"moe_expert_capacity_factor={extra['moe_expert_capacity_factor']} with phd_repeat={model.phd_repeat}: "
            "copies compete with original tokens for room in the experts, so originals are no longer those of the "
            "vanilla model; leave it out for dropless routing"
        )
    if extra.get("moe_expert_capacity_factor") is not None:
        found.append(
            f"moe_expert_capacity_factor={extra['moe_expert_capacity_factor']}: what is dropped depends on the rows "
            "that a rank holds, so layouts with other tensor or context sizes train a little differently"
        )
    if "global_load_balancing_loss" in router_losses(model):
        found.append(
            "global_aux_loss counts the micro-batches seen so far in the step, so another data-parallel or micro-batch "
            "size trains a little differently"
        )
    found += _copies_that_surprise(model)
    parallel = config.parallel
    if parallel.context_parallel_size == 1 and parallel.cp_comm_type != ParallelConfig.cp_comm_type:
        found.append(f"cp_comm_type={parallel.cp_comm_type} has no effect at context_parallel_size=1")
    backend = extra.get("attention_backend")
    if backend not in (None, "auto"):
        found.append(
            f"attention_backend={backend} chooses among Megatron-Core's own attention kernels, which PHD attention "
            "does not use; choose with phd_attention_backend"
        )
    return found


def _copies_that_surprise(model: ModelConfig) -> list[str]:
    options = {name: getattr(model, name) for name in ("phd_copy_positions", "phd_copy_embedding")}
    given = [f"{name}={value}" for name, value in options.items() if value != fields()[name].default]
    if model.phd_repeat == 1:
        return [f"{', '.join(given)}: no effect at phd_repeat=1"] if given else []
    if model.phd_copy_positions != "repeated":
        return []
    return [
        f"phd_copy_positions=repeated: tokens are {model.phd_repeat} RoPE positions apart, which go up to "
        f"{model.phd_repeat * model.seq_length - 1} for {model.seq_length} tokens; rotary_base="
        f"{model.rotary_base:g} has to do for that"
    ]
