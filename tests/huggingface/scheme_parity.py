"""Program of ``test_against_megatron.py``: the weights of a Megatron-Core model, through the mapping, in memory.

Every norm scheme with K = 2, and those that a class of transformers computes with K = 1. Argument 1 is a directory to
put the bundled code in. Prints one JSON line a case: name, class, relative error of the logits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import RunConfig
from phd_megatron.norm.schemes import NORM_SCHEMES
from phd_megatron.runtime.context import Runtime

MODEL = {"num_layers": 4, "hidden_size": 48, "ffn_hidden_size": 80, "num_attention_heads": 6, "num_query_groups": 2}
MODEL |= {"kv_channels": 8, "seq_length": 24, "vocab_size": 257, "untie_embeddings_and_output_weights": True}
PHD = {"phd_repeat": 2, "phd_window": 4, "phd_chunk": 8}
CASES = [(scheme, PHD, "RMSNorm") for scheme in NORM_SCHEMES]
CASES += [(scheme, {}, "RMSNorm") for scheme in ("pre", "pre_qk", "olmo2")]
CASES += [(scheme, PHD, "LayerNorm") for scheme in ("olmo2", "sandwich", "embed_norm", "pre_qkvc_post")]


def full_tensors(model: Any, group: Any) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors, put together from their parts."""
    from phd_megatron.model.initialisation import sharded_tensors

    tensors: dict[str, torch.Tensor] = {}
    for part in sharded_tensors(model, group):
        target = tensors.setdefault(part.key, torch.full(tuple(part.global_shape), torch.nan))
        sizes = zip(part.global_offset, part.local_shape, strict=True)
        target[tuple(slice(start, start + size) for start, size in sizes)] = part.data.detach()
    return tensors


def main(directory: Path) -> None:
    runtime = Runtime.start(RunConfig().parallel, seed=1, verbose=False)

    from megatron.core import parallel_state
    from transformers import AutoConfig, AutoModelForCausalLM

    from phd_megatron.huggingface.architecture import Architecture
    from phd_megatron.huggingface.bundle_files import write_bundle
    from phd_megatron.huggingface.config_json import TokenIds, write_config
    from phd_megatron.huggingface.families import export_family
    from phd_megatron.huggingface.mapping import model_rules
    from phd_megatron.model.build import build_model

    write_bundle(directory)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(257, (2, 24), generator=generator)
    for scheme, policy, normalization in CASES:
        run = RunConfig()
        for field, value in {**MODEL, **policy, "norm_scheme": scheme, "normalization": normalization}.items():
            setattr(run.model, field, value)
        resolve(run)
        model = build_model(run, 257, runtime.device)[0].eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():  # initial norms would hide a mix-up
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * (0.2 if "norm" in key else 0.1))
            expected = model(tokens, torch.arange(24).expand(2, -1), None)[..., :257]
        architecture = Architecture.from_model(run.model, 257)
        family = export_family(architecture)
        config = write_config(architecture, family, "float32", TokenIds())
        (directory / "config.json").write_text(json.dumps(config))
        config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
        exported = AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()
        tensors = full_tensors(model, parallel_state.get_data_parallel_group(with_context_parallel=True))
        weights: dict[str, torch.Tensor] = {}
        for rule in model_rules(architecture, family):
            weights |= rule.to_hf(tensors.pop(rule.mcore))
        assert not tensors, sorted(tensors)
        exported.load_state_dict(weights, strict=True)
        with torch.no_grad():
            error = (exported(tokens).logits - expected).norm() / expected.norm()
        name = f"{scheme} K={run.model.phd_repeat} {normalization}"
        print(json.dumps([name, type(exported).__name__, error.item()]), flush=True)
    runtime.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
