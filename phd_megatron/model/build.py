"""Assemble the model chunks that this rank holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.overrides import TorchFunctionMode

from phd_megatron.config.architecture import padded_vocab_size
from phd_megatron.config.rope import Llama3
from phd_megatron.config.schema import RunConfig
from phd_megatron.model.dispatch import replace_dispatchers
from phd_megatron.model.gpt_model import PHDGPTModel
from phd_megatron.model.initialisation import initialise
from phd_megatron.model.layer_specs import block_spec
from phd_megatron.model.moe import mark_expert_parameters
from phd_megatron.model.quantised import plain_weights
from phd_megatron.model.transformer_config import PHDTransformerConfig, build_transformer_config
from phd_megatron.runtime.capabilities import probe
from phd_megatron.runtime.expert_backends import experts_backend
from phd_megatron.runtime.implementations import fused_norms, gradient_accumulation, use_transformer_engine
from phd_megatron.runtime.parallel_dims import ParallelDims
from phd_megatron.runtime.requirements import require
from phd_megatron.runtime.userbuffers import start_userbuffers


def build_model(
    run: RunConfig,
    true_vocab_size: int,
    device: torch.device,
    pg_collection: ProcessGroupCollection | None = None,
    keep_copies: bool = False,
) -> list[PHDGPTModel]:
    """The initialised model chunks of this rank, on ``device``, in the run's parameter type.

    One, or with virtual pipeline stages one for each, in the order in which activations pass. They share one
    configuration. On the ``meta`` device parameters have shapes and no values, so a model of any size can be looked at.

    With ``keep_copies`` they evaluate every copy of a token, see :class:`~phd_megatron.model.gpt_model.PHDGPTModel`.

    Raises:
        UserError: for what this machine or the layout would compute otherwise than asked.
    """
    if device.type == "meta":
        with _OnMeta(), device:
            return _build_chunks(run, true_vocab_size, device, pg_collection, keep_copies)
    return _build_chunks(run, true_vocab_size, device, pg_collection, keep_copies)


class _OnMeta(TorchFunctionMode):
    """Tensors that ask for a device by name get none: Megatron-Core's layers allocate on the current device."""

    def __torch_function__(
        self,
        func: Callable[..., Tensor],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        options = dict(kwargs or {})
        if options.get("device") is not None:
            options["device"] = "meta"
        return func(*args, **options)


def _build_chunks(
    run: RunConfig,
    true_vocab_size: int,
    device: torch.device,
    pg_collection: ProcessGroupCollection | None,
    keep_copies: bool,
) -> list[PHDGPTModel]:
    config = build_transformer_config(run, keep_copies)
    config.device = device
    accumulates = ""
    if device.type != "meta":  # shapes are the same whatever computes
        capabilities = probe(device.type, device.index)
        dims = ParallelDims.from_config(run.parallel, torch.distributed.get_world_size())
        require(run, dims, capabilities)
        config.transformer_engine, _ = use_transformer_engine(run.model.transformer_impl, capabilities)
        if run.model.transformer.get("num_moe_experts") is not None:
            config.experts_backend, _ = experts_backend(run, config.transformer_engine, capabilities)
        config.fused_norms = fused_norms(run.model, config.transformer_engine)
        accumulates, _ = gradient_accumulation(run, capabilities)
        if config.tp_comm_overlap:
            start_userbuffers(run, dims)
    config.gradient_accumulation_fusion = accumulates == "all"
    virtual = config.virtual_pipeline_model_parallel_size
    stages = [None] if virtual is None else range(virtual)
    models = [_build_chunk(run, config, true_vocab_size, device, pg_collection, stage) for stage in stages]
    if accumulates == "te":
        for model in models:
            accumulate_in_transformer_engine(model)
    return models


def accumulate_in_transformer_engine(model: PHDGPTModel) -> None:
    """Let its layers add a weight's gradient to the gradient buffer in the GEMM.

    Megatron-Core has one switch for these and for its own layers, which cannot do it without apex.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def _build_chunk(
    run: RunConfig,
    config: PHDTransformerConfig,
    true_vocab_size: int,
    device: torch.device,
    pg_collection: ProcessGroupCollection | None,
    vp_stage: int | None,
) -> PHDGPTModel:
    pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
    model = PHDGPTModel(
        true_vocab_size=true_vocab_size,
        config=config,
        transformer_layer_spec=block_spec(config, vp_stage),
        vocab_size=padded_vocab_size(true_vocab_size, run.model.make_vocab_size_divisible_by),
        max_sequence_length=run.model.max_position_embeddings or run.model.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=not run.model.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_percent=run.model.rotary_percent,
        rotary_base=run.model.rotary_base,
        rope_scaling=isinstance(config.rope, Llama3),
        rope_scaling_factor=run.model.rope_scaling_factor,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )
    mark_expert_parameters(model)
    replace_dispatchers(model)
    if device.type == "meta":
        return model
    with plain_weights(model, config.params_dtype):
        initialise(model, config, run.training.seed, pg_collection.dp_cp)
    return model.to(device)
