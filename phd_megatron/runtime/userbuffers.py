"""Tensor-parallel communication inside Transformer Engine's GEMMs (``tp_comm_overlap``): its buffers and their terms.

Every transfer goes through one buffer that has the rows of a micro-batch, so all products must have that many.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from phd_megatron.config.precision import fp8_layers
from phd_megatron.config.schema import RunConfig
from phd_megatron.runtime.capabilities import Capabilities, version_text
from phd_megatron.runtime.parallel_dims import ParallelDims

_SINCE = (2, 7)  #: of Transformer Engine: buffers for several precisions in one run


def overlap_problems(run: RunConfig, dims: ParallelDims, capabilities: Capabilities) -> Iterator[str]:
    """Why this run cannot have it, one sentence each."""
    model = run.model
    if not model.transformer.get("tp_comm_overlap"):
        return
    te = capabilities.transformer_engine
    if te is not None and te < _SINCE:
        yield (
            f"tp_comm_overlap=True: Transformer Engine is {version_text(te)}, and it needs {version_text(_SINCE)}; "
            "install a newer one, or leave it out"
        )
    if dims.tp == 1 or not dims.sp:
        yield (
            f"tp_comm_overlap=True with tensor_model_parallel_size={dims.tp} and sequence_parallel={dims.sp}: it "
            "overlaps the gathering and scattering of rows that both together bring; set both, or leave it out"
        )
    if model.phd_repeat > 1 and model.phd_last_layer_pruning:
        yield (
            f"tp_comm_overlap=True with phd_repeat={model.phd_repeat}: the last layer computes the last copy alone, "
            "and the buffers have the rows of all copies; set phd_last_layer_pruning=False, or leave it out"
        )
    if model.transformer.get("num_moe_experts") is not None:
        yield "tp_comm_overlap=True with experts is not tested; leave it out"


def start_userbuffers(run: RunConfig, dims: ParallelDims) -> None:
    """Make the buffers, once; all ranks together. Without NVLink multicast set ``UB_SKIPMC=1``."""
    from transformer_engine.pytorch.module import base

    model = run.model
    rows = model.phd_repeat * model.seq_length * run.training.micro_batch_size // dims.cp
    mode = base.UserBufferQuantizationMode
    layers = fp8_layers(model)
    modes = ([mode.FP8] if layers else []) + ([mode.NONE] if len(layers) < (model.num_layers or 0) else [])
    base.initialize_ub(
        shape=[rows, model.hidden_size],
        tp_size=dims.tp,
        quantization_modes=modes,
        bootstrap_backend=model.transformer.get("tp_comm_bootstrap_backend", "nccl"),
    )


def stop_userbuffers() -> None:
    """Give the buffers back, if there are any."""
    base = sys.modules.get("transformer_engine.pytorch.module.base")
    if base is not None and getattr(base, "_ub_communicators", None) is not None:
        base.destroy_ub()
