"""Layouts of which every real rank is compared with its dry run. Each is small, and covers another transfer."""

from __future__ import annotations

from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import ModelConfig, ParallelConfig, RunConfig

SIZES = {
    **{"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2},
    **{"seq_length": 64, "vocab_size": 257, "norm_scheme": "hybrid_star"},
}
PHD = {"phd_repeat": 2, "phd_window": 8, "phd_chunk": 16}
EXPERTS = {"num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 48}
#: short names of what a case sets
LAYOUT = {
    **{"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size", "cp": "context_parallel_size"},
    **{"ep": "expert_model_parallel_size", "etp": "expert_tensor_parallel_size", "sp": "sequence_parallel"},
    **{"vpp": "virtual_pipeline_model_parallel_size", "do": "use_distributed_optimizer"},
    **{"og": "overlap_grad_reduce", "opg": "overlap_param_gather"},
}
#: number of ranks -> cases: layout, K, experts, half, micro-batches of a step (m), as ``tp2 sp k2``
CASES = {
    4: (
        "tp2 k2",
        "tp2 sp k1 do half",
        "tp4 sp k2 m2 half",
        "pp2 k2 m3",
        "pp2 vpp2 k1 m4",
        "pp4 k2 m6 half do",
        "k1 m2",
        "k2 do og opg half m2",
        "tp2 pp2 sp k2 m3 do",
        "cp2 k2 m2",
        "cp4 k2 do half",
        "tp2 cp2 sp k1",
        "moe ep2 k2 m2",
        "moe ep4 k1 do half",
        "moe ep2 tp2 sp k2",
        "moe ep2 tp2 etp1 sp k1 do half m2",
        "moe pp2 ep2 k2 m3",
        "moe k1",
    ),
    8: ("tp2 pp2 cp2 sp k2 m3 do half", "moe tp2 pp2 ep2 sp k2 m3 do half", "pp4 vpp1 tp2 k1 m5 do half og opg"),
}


def configuration(case: str, ranks: int) -> tuple[RunConfig, int]:
    """The resolved run of a case, and the micro-batches of its step."""
    words = case.split()
    values = {word.rstrip("0123456789"): int(word.lstrip("abcdefghijklmnopqrstuvwxyz") or 1) for word in words}
    model = {**SIZES, **(PHD if values["k"] == 2 else {})}
    transformer = dict(EXPERTS) if "moe" in values else {}
    layout = {LAYOUT[name]: value for name, value in values.items() if name in LAYOUT}
    for name in ("sequence_parallel", "use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"):
        layout[name] = bool(layout.get(name))
    run = RunConfig(ModelConfig(**model, transformer=transformer), ParallelConfig(device="cpu", **layout))
    run.training.bf16, run.training.micro_batch_size = "half" in values, 2
    divided = values.get("tp", 1) * values.get("pp", 1) * values.get("cp", 1)
    count = values.get("m", 1)
    run.training.global_batch_size = count * 2 * (ranks // divided)
    run.training.train_iters = 2
    resolve(run)
    return run, count
