"""Bytes that one forward pass of a model with experts keeps on each rank, beside what is planned.

Runs under torchrun with layouts as ``field=value,...``; rank 0 prints a line of JSON with a pair for each of them.
"""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist

from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import ModelConfig, ParallelConfig, RunConfig
from phd_megatron.planning.run_plan import plan_run
from phd_megatron.runtime.context import Runtime

LENGTH = 256
MODEL = {
    **{"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 384, "num_attention_heads": 4, "num_query_groups": 2},
    **{"seq_length": LENGTH, "vocab_size": 257, "phd_repeat": 2, "phd_last_layer_pruning": False},
}
EXPERTS = {"num_moe_experts": 8, "moe_router_topk": 4, "moe_ffn_hidden_size": 256}


def measured(layout: dict[str, int]) -> tuple[int, int]:
    """What is kept, the mean of the ranks, and what is planned."""
    from phd_megatron.model.build import build_model

    options = {**layout, "sequence_parallel": bool(layout.get("sequence_parallel"))}
    model_config = ModelConfig(**MODEL, transformer=dict(EXPERTS))
    run = RunConfig(model=model_config, parallel=ParallelConfig(device="cpu", **options))
    run.training.micro_batch_size = 4
    resolve(run)
    with Runtime.start(run.parallel, model=run.model, training=run.training, verbose=False):
        (model,) = build_model(run, 257, torch.device("cpu"))
        parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
            return tensor

        tokens = torch.randint(0, 257, (4, LENGTH + 1), generator=torch.Generator().manual_seed(0))
        positions = torch.arange(LENGTH).expand(4, -1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=tokens[:, :-1], position_ids=positions, attention_mask=None, labels=tokens[:, 1:])
        total = torch.tensor(float(sum(size for size, _ in kept.values())))
        dist.all_reduce(total)
        ranks = dist.get_world_size()
        return int(total / ranks), plan_run(run, 1, ranks).memory.activations


if __name__ == "__main__":
    found = []
    for word in sys.argv[1:]:
        fields = dict(pair.split("=") for pair in word.split(",") if pair)
        found.append(measured({name: int(value) for name, value in fields.items()}))
    if os.environ["RANK"] == "0":
        print("BYTES", json.dumps(found), flush=True)
