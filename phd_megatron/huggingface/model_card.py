"""The README.md of an exported directory."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

from phd_megatron import __version__
from phd_megatron.huggingface.architecture import Architecture
from phd_megatron.huggingface.checkpoint import MegatronCheckpoint
from phd_megatron.huggingface.export_output import EXPORTED_BY
from phd_megatron.huggingface.family import Family

#: by whether the model's own code is bundled
_LOADS = {
    True: "transformers 5 or later, and the code in this directory",
    False: "transformers 5 and 4 (tried with 4.57)",
}


def model_card(
    architecture: Architecture, source: MegatronCheckpoint, family: Family, dtype: str, parameters: int, title: str
) -> str:
    """What the model is, how it was trained, and how to load it."""
    remote = ", trust_remote_code=True" if family.is_bundled else ""
    rows = _rows(architecture, source, family, dtype, parameters)
    table = "\n".join([*(f"| {name} | {value} |" for name, value in rows), f"{EXPORTED_BY}{__version__} |"])
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- phd-transformer
- hybridnorm
---

# {title}

A decoder language model pretrained with phd-megatron ({architecture.name}).

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{title}"{remote})
tokenizer = AutoTokenizer.from_pretrained("{title}"{remote})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
{_notes(architecture, family)}"""


def _rows(
    a: Architecture, source: MegatronCheckpoint, family: Family, dtype: str, parameters: int
) -> Iterator[tuple[str, str]]:
    run = source.run
    yield "Class", family.model_class
    yield "Norm scheme", a.norm_scheme
    yield "PHD variant", a.policy.name
    yield "Parameters", f"{parameters:,} ({dtype})"
    yield "Layers, width, FFN", f"{a.num_layers}, {a.hidden_size}, {a.ffn_hidden_size}"
    yield "Query heads, KV heads, head size", f"{a.heads}, {a.groups}, {a.head_dim}"
    yield "Vocabulary", f"{a.vocab_size:,}"
    yield "Trained length", f"{run.model.seq_length:,} tokens"
    if a.policy.repeat > 1:
        yield "Copies told apart by", f"RoPE positions: {a.copy_positions}; embedding: {a.copy_embedding}"
    if source.iteration is not None:
        yield "Training step", f"{source.iteration:,}"
    if isinstance(samples := source.training_state.get("consumed_samples"), int):
        yield "Training tokens", f"{samples * run.model.seq_length:,} ({samples:,} samples)"
    yield "Optimizer", f"AdamW, peak lr {run.optimizer.lr:g}, {run.optimizer.lr_decay_style} decay"
    yield "Written with", f"torch {version('torch')}, transformers {version('transformers')}"
    yield "Loads with", _LOADS[family.is_bundled]


def _notes(a: Architecture, family: Family) -> str:
    if not family.is_bundled:
        return ""
    notes = "\nThe code in this directory needs torch and transformers 5 alone. "
    notes += (
        "Weights of 8 bits: `from_pretrained(..., quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))`, or "
        "`Float8WeightOnlyConfig` (torchao). `torch.compile(fullgraph=True)`, `torch.export` and ONNX take the model, "
        "with `use_cache=False`. "
    )
    if a.policy.repeat > 1:
        notes += (
            f"Every token is repeated {a.policy.repeat} times inside the decoder (PHD-Transformer, arXiv 2504.14992); "
            "the KV cache holds what a vanilla model's holds, plus at most "
            f"{a.policy.max_hidden_entries} entries per layer. "
        )
    return notes + "The norm schemes are those of HybridNorm (arXiv 2503.04598); see `norm_schemes.py`.\n"
