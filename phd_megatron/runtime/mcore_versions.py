"""What differs between versions of Megatron-Core.

pip may install those of :data:`RANGE`; from 0.17 on they need Python 3.12. :data:`DIFFERENCES` lists what differs, and
where the code must do one thing or the other it asks a function here, or takes both forms. Nothing else looks at a
version. Which ones the tests run on is in :mod:`phd_megatron.runtime.compatibility`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

#: the versions that pip may install, as in pyproject.toml
RANGE = ">=0.16.1,<0.20"


@dataclass(frozen=True)
class Difference:
    """One row.

    Attributes:
        since: first version in which it is so.
        what: was changed, and how both forms are served.
        test: that fails where one of them is not.
    """

    since: str
    what: str
    test: str


DIFFERENCES = (
    Difference(
        "0.17",
        "an MoE layer's spec is a partial of its module, as are those of its experts: submodules()",
        "tests/integration/test_moe_parity.py",
    ),
    Difference(
        "0.17",
        "the router's attach_and_log_load_balancing_loss says needs_dp_avg for reduce_group_has_dp: PHDRouter reads "
        "neither",
        "tests/integration/test_moe_parity.py",
    ),
    Difference(
        "0.18",
        "modules get a name, and routers is_mtp_layer: PHDRouter passes on what it does not know",
        "tests/integration/test_moe_parity.py",
    ),
    Difference(
        "0.17",
        "a load strategy is told how a checkpoint was written in the background: SafeLoad does not ask",
        "tests/integration/test_reshard.py",
    ),
    Difference(
        "0.18",
        "its calculator of micro-batches ignores a ramp-up of the batch: Batches counts by itself",
        "tests/integration/test_resume.py",
    ),
    Difference(
        "0.17",
        "extra states of Transformer Engine name a function of Megatron-Core: what is read is written again",
        "tests/unit/test_implementations.py",
    ),
    Difference(
        "0.19",
        "a data set's query returns the lengths of its documents too: IndexedGPTDataset passes on what follows",
        "tests/unit/test_datasets.py",
    ),
    Difference(
        "0.18",
        "triton is imported unconditionally: the CPU backend's triton-kernels",
        "tests/distributed/test_cpu_backend.py",
    ),
    Difference(
        "0.17",
        "TransformerConfig has other fields: FIELDS_SINCE, FIELDS_UNTIL",
        "tests/unit/test_config_megatron.py",
    ),
)

#: first version whose ``OptimizerConfig`` says ``muon_*`` as we do, and that builds muon of the package on PyPI
MUON_SINCE = "0.19"
#: first version that can leave a step out for its gradient norm
SKIP_SINCE = "0.18"

#: fields of ``TransformerConfig`` (patterns) that have a row in our tables: first version that has them
FIELDS_SINCE = {
    "fused_residual_rmsnorm": "0.17",
    "moe_pad_experts_for_cuda_graph_inference": "0.17",
    "moe_router_force_biased": "0.17",
    "mup_*": "0.17",
    "use_mup": "0.17",
    "nccl_all_reduce_for_prefill": "0.17",
    "cuda_graph_modules": "0.18",
    "fine_grained_offloading_max_inflight_offloads": "0.18",
    "fp8_output_proj": "0.18",
    "high_priority_a2a_comm_stream": "0.18",
    "mlp_chunks_for_training": "0.18",
    "moe_expert_rank_capacity_factor": "0.18",
    "moe_hybridep_num_blocks_*": "0.18",
    "moe_hybridep_num_sms_preprocessing": "0.18",
    "moe_permute_fusion_into_hybridep": "0.18",
    "moe_mlp_glu_interleave_size": "0.18",
    "moe_paged_stash*": "0.18",
    "moe_single_grouped_*": "0.18",
    "overlap_dispatch_backward_with_experts_wgrad": "0.18",
    "use_grouped_gemm_for_*": "0.18",
    "use_transformer_engine_op_fuser": "0.18",
    "activation_offload_fraction": "0.19",
    "delay_offload_until_cuda_graph": "0.19",
    "delta_offload_bytes_across_pp_ranks": "0.19",
    "*gtp_weight_remat_size": "0.19",
    "*tensor_parallel_num_weight_shards": "0.19",
    "flash_attention_version": "0.19",
    "moe_flex_dispatcher_num_sms": "0.19",
    "moe_hybridep_pad_uneven_dispatch_inputs": "0.19",
    "moe_ncclep_*": "0.19",
    "moe_router_quantile_balancing_ema": "0.19",
    "moe_shared_expert_glu_interleave_size": "0.19",
}
#: the same of those that are gone: first version without them
FIELDS_UNTIL = {
    "async_tensor_model_parallel_allreduce": "0.17",
    "moe_extended_tp": "0.17",
    "moe_use_legacy_grouped_gemm": "0.17",
}


def installed() -> tuple[int, ...] | None:
    """Version of the Megatron-Core that is installed; None without one."""
    try:
        return numbers(version("megatron-core"))
    except PackageNotFoundError:
        return None


def absent_fields() -> set[str]:
    """Those of :data:`FIELDS_SINCE` and :data:`FIELDS_UNTIL` that the installed version does not have."""
    here = installed() or ()
    later = {name for name, since in FIELDS_SINCE.items() if here < numbers(since)}
    return later | {name for name, until in FIELDS_UNTIL.items() if here >= numbers(until)}


def numbers(text: str) -> tuple[int, ...]:
    """``0.19.2`` or ``0.20.0rc1`` as the numbers before anything else."""
    found = []
    for part in text.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        found.append(int(digits))
        if digits != part:
            break
    return tuple(found)


def submodules(spec: Any) -> Any:
    """The parts of a module's spec, to be changed in place: of a ``ModuleSpec``, or of a partial of the module."""
    return spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules
