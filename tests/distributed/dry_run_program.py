"""Steps of real ranks over gloo, counted as a dry run counts its own.

Runs under torchrun with a directory and cases as ``tp2 sp k2``; each rank writes a file of JSON there, with a list
of what it counted for each case.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork

from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import ModelConfig, ParallelConfig, RunConfig
from phd_megatron.planning.trace import Trace
from phd_megatron.runtime.context import Runtime, install_backend

PER_NODE = 2
Row = dict[str, Any]
SIZES = {
    **{"hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2},
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


def configuration(case: str, ranks: int) -> tuple[RunConfig, int]:
    """The resolved run of a case, and the micro-batches of its step."""
    words = case.split()
    values = {word.rstrip("0123456789"): int(word.lstrip("abcdefghijklmnopqrstuvwxyz") or 1) for word in words}
    depth = max(2, values.get("pp", 1) * values.get("vpp", 1))
    model = {**SIZES, "num_layers": depth, **(PHD if values["k"] == 2 else {})}
    transformer = dict(EXPERTS) if "moe" in values else {}
    if "alltoall" in values:
        transformer["moe_token_dispatcher_type"] = "alltoall"
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


class Settled(Trace):
    """Waits for each collective, and until nobody holds its tensors.

    A gloo transfer holds them as long as its handle lives, and its thread for a moment longer; NCCL's does not, and
    neither does a dry run. Messages of two ranks wait for each other and are left alone.
    """

    def sent(self, name: str, out: Any) -> Any:
        """A handle of nothing in the place of gloo's."""
        if name in ("send", "recv_", "barrier"):
            return out
        *tensors, work = out if isinstance(out, tuple) else (out,)
        dist.Work.unbox(work).wait()
        del out, work
        time.sleep(0.001)
        done = FakeWork().boxed()
        return (*tensors, done) if tensors else done


def dry(case: str, ranks: int, rank: int) -> Row:
    """What the product says of this rank."""
    from phd_megatron.training.dry_run import dry_run

    plan = dry_run(configuration(case, ranks)[0], ranks, rank, per_node=PER_NODE, whole=True)
    return {name: getattr(plan, name) for name in ("held", "peak", "collectives", "flops", "path")}


def counted(case: str, ranks: int, rank: int) -> Row:
    """One step of this rank, after one that is not counted."""
    from phd_megatron.planning.dry_plan import collectives
    from phd_megatron.planning.groups import groups_of_this_rank
    from phd_megatron.training.dry_run import routing_of, traced

    run, count = configuration(case, ranks)
    with Runtime.start(run.parallel, model=run.model, training=run.training, verbose=False) as runtime:
        run.parallel.sequence_parallel = runtime.dims.sp
        groups = groups_of_this_rank()
        with routing_of(run, runtime.dims):
            found = traced(run, runtime.dims, (count,), Settled())
    (step,) = found.steps
    rows = collectives(step.counts, groups, rank, PER_NODE)
    return {
        **{"held": found.held, "peak": step.peak, "collectives": rows},
        **{"flops": step.counts.flops, "path": found.path},
    }


if __name__ == "__main__":
    install_backend("cpu")  # before Megatron is imported
    directory, *cases = sys.argv[1:]
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    began = time.perf_counter()
    found = [{"dry": dry(case, ranks, rank)} for case in cases]
    middle = time.perf_counter()
    for row, case in zip(found, cases, strict=True):
        row["real"] = counted(case, ranks, rank)
    Path(directory, f"{rank}.json").write_text(json.dumps(found), "utf-8")
    print(f"rank {rank}: {middle - began:.1f} s dry, {time.perf_counter() - middle:.1f} s real", flush=True)
