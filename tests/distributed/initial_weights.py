"""Build a model with experts under one layout after the other and print a digest of its full initial weights.

Arguments: one layout each, such as ``tensor_model_parallel_size=2,sequence_parallel=1``; ``norm_scheme=NAME`` may
be among the words.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys

import torch

from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import ModelConfig, ParallelConfig, RunConfig
from phd_megatron.runtime.context import Runtime, install_backend

MODEL = {
    **{"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2},
    **{"make_vocab_size_divisible_by": 16, "seq_length": 16},
}
EXPERTS = {
    **{"num_moe_experts": 4, "moe_ffn_hidden_size": 24, "moe_layer_freq": [0, 1, 1, 1]},
    **{"moe_shared_expert_intermediate_size": 16, "moe_shared_expert_gate": True},
}


def digest(words: str) -> str:
    """Of every parameter's full values, put together from all ranks."""
    given = dict(word.split("=") for word in words.split(",") if word)
    model = {**MODEL, "norm_scheme": given.pop("norm_scheme", "hybrid_star")}
    options = {name: int(value) for name, value in given.items()}
    options["sequence_parallel"] = bool(options.get("sequence_parallel"))
    run = RunConfig(
        model=ModelConfig(**model, transformer=dict(EXPERTS)), parallel=ParallelConfig(device="cpu", **options)
    )
    resolve(run)
    with Runtime.start(run.parallel, model=run.model, training=run.training, verbose=False) as runtime:
        from megatron.core import parallel_state

        from phd_megatron.model.build import build_model
        from phd_megatron.model.initialisation import sharded_tensors

        models = build_model(run, 50, runtime.device)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        parts = {
            f"{part.key}|{tuple(map(int, part.global_offset))}": (tuple(part.global_shape), part.data.detach())
            for model in models
            for part in sharded_tensors(model, group)
        }
        gathered: list = [None] * runtime.world_size
        torch.distributed.all_gather_object(gathered, parts)
    full: dict[str, torch.Tensor] = {}
    for rank in gathered:
        for name, (shape, data) in rank.items():
            key, offset = name.split("|")
            target = full.setdefault(key, torch.full(shape, torch.nan))
            starts = json.loads(offset.replace("(", "[").replace(",)", "]").replace(")", "]"))
            sizes = [1] * (len(shape) - data.dim()) + list(data.shape)
            target[tuple(slice(a, a + n) for a, n in zip(starts, sizes, strict=True))] = data
    assert not any(tensor.isnan().any() for tensor in full.values())
    return hashlib.sha256(b"".join(full[key].numpy().tobytes() for key in sorted(full))).hexdigest()


install_backend("cpu")
found = [digest(words) for words in sys.argv[1:]]
if os.environ["RANK"] == "0":
    print("DIGESTS", json.dumps(found), flush=True)
