"""Assemble the model chunks that this rank holds."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.overrides import TorchFunctionMode

from phd_megatron.config.schema import RunConfig
from phd_megatron.config.vocabulary import padded_vocab_size
from phd_megatron.errors import UserError
from phd_megatron.model.gpt_model import PHDGPTModel
from phd_megatron.model.initialisation import initialise
from phd_megatron.model.layer_specs import block_spec
from phd_megatron.model.moe import mark_expert_parameters
from phd_megatron.model.transformer_config import PHDTransformerConfig, build_transformer_config


def use_transformer_engine(transformer_impl: str, on_cuda: bool) -> tuple[bool, str]:
    """Whether linear layers come from Transformer Engine, and why.

    Raises:
        UserError: if it is asked for and cannot be had.
    """
    if transformer_impl == "local":
        return False, "asked for by transformer_impl=local"
    problem = _import_problem() if on_cuda else None
    if on_cuda and problem is None:
        return True, "Transformer Engine is installed"
    reason = problem or "there is no CUDA device"
    if transformer_impl == "transformer_engine":
        raise UserError(
            f"transformer_impl=transformer_engine, but {reason}; use transformer_impl=auto, or install "
            "'phd-megatron[te]' on a GPU machine"
        )
    return False, reason


def _import_problem() -> str | None:
    """Why Transformer Engine cannot be had: it is absent, or built for another CUDA or torch."""
    if importlib.util.find_spec("transformer_engine") is None:
        return "transformer-engine is not installed"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a library that does not fit raises anything: ImportError, OSError, RuntimeError
        return f"transformer-engine is installed but does not import ({type(error).__name__}: {error})"
    return None


def build_model(
    run: RunConfig, true_vocab_size: int, device: Any, pg_collection: ProcessGroupCollection | None = None
) -> list[PHDGPTModel]:
    """The initialised model chunks of this rank, on ``device``, in the run's parameter type.

    One, or with virtual pipeline stages one for each, in the order in which activations pass. They share one
    configuration. On the ``meta`` device parameters have shapes and no values, so a model of any size can be looked at.
    """
    if device.type == "meta":
        with _OnMeta(), device:
            return _build_chunks(run, true_vocab_size, device, pg_collection)
    return _build_chunks(run, true_vocab_size, device, pg_collection)


class _OnMeta(TorchFunctionMode):
    """Tensors that ask for a device by name get none: Megatron-Core's layers allocate on the current device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if options.get("device") is not None:
            options["device"] = "meta"
        return func(*args, **options)


def _build_chunks(
    run: RunConfig, true_vocab_size: int, device: Any, pg_collection: ProcessGroupCollection | None
) -> list[PHDGPTModel]:
    config = build_transformer_config(run)
    virtual = config.virtual_pipeline_model_parallel_size
    stages = [None] if virtual is None else range(virtual)
    return [_build_chunk(run, config, true_vocab_size, device, pg_collection, stage) for stage in stages]


def _build_chunk(
    run: RunConfig,
    config: PHDTransformerConfig,
    true_vocab_size: int,
    device: Any,
    pg_collection: ProcessGroupCollection | None,
    vp_stage: int | None,
) -> PHDGPTModel:
    transformer_engine, _ = use_transformer_engine(run.model.transformer_impl, device.type == "cuda")
    pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
    model = PHDGPTModel(
        true_vocab_size=true_vocab_size,
        config=config,
        transformer_layer_spec=block_spec(config, transformer_engine, vp_stage),
        vocab_size=padded_vocab_size(true_vocab_size, run.model.make_vocab_size_divisible_by),
        max_sequence_length=run.model.max_position_embeddings or run.model.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=not run.model.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_percent=run.model.rotary_percent,
        rotary_base=run.model.rotary_base,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )
    mark_expert_parameters(model)
    if device.type == "meta":
        return model
    initialise(model, config, run.training.seed, pg_collection.dp_cp)
    return model.to(device)
