"""The README.md of an exported directory."""

from __future__ import annotations

from importlib.metadata import version

from phd_megatron import __version__
from phd_megatron.huggingface.architecture import BUNDLED, Architecture
from phd_megatron.huggingface.checkpoint import MegatronCheckpoint
from phd_megatron.huggingface.export_output import EXPORTED_BY

#: by whether the model's own code is bundled
_LOADS = {
    True: "transformers 5 or later, and the code in this directory",
    False: "transformers 5 and 4 (tried with 4.57)",
}


def model_card(
    architecture: Architecture, source: MegatronCheckpoint, model_class: str, dtype: str, parameters: int, title: str
) -> str:
    """What the model is, how it was trained, and how to load it."""
    a, training, run = architecture, source.training_state, source.run
    remote = ", trust_remote_code=True" if model_class == BUNDLED else ""
    rows = [
        ("Class", model_class),
        ("Norm scheme", a.norm_scheme),
        ("PHD variant", a.policy.name),
        ("Parameters", f"{parameters:,} ({dtype})"),
        ("Layers, width, FFN", f"{a.num_layers}, {a.hidden_size}, {a.ffn_hidden_size}"),
        ("Query heads, KV heads, head size", f"{a.heads}, {a.groups}, {a.head_dim}"),
        ("Vocabulary", f"{a.vocab_size:,}"),
        ("Trained length", f"{run.model.seq_length:,} tokens"),
    ]
    if a.policy.repeat > 1:
        rows.append(("Copies told apart by", f"RoPE positions: {a.copy_positions}; embedding: {a.copy_embedding}"))
    if source.iteration is not None:
        rows.append(("Training step", f"{source.iteration:,}"))
    if isinstance(samples := training.get("consumed_samples"), int):
        rows.append(("Training tokens", f"{samples * run.model.seq_length:,} ({samples:,} samples)"))
    rows.append(("Optimizer", f"AdamW, peak lr {run.optimizer.lr:g}, {run.optimizer.lr_decay_style} decay"))
    rows.append(("Written with", f"torch {version('torch')}, transformers {version('transformers')}"))
    rows.append(("Loads with", _LOADS[model_class == BUNDLED]))
    table = "\n".join([*(f"| {name} | {value} |" for name, value in rows), f"{EXPORTED_BY}{__version__} |"])
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- phd-transformer
- hybridnorm
---

# {title}

A decoder language model pretrained with phd-megatron ({a.name}).

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
{_notes(a, model_class)}"""


def _notes(a: Architecture, model_class: str) -> str:
    if model_class != BUNDLED:
        return ""
    notes = "\nThe code in this directory needs torch and transformers 5 alone. "
    if a.policy.repeat > 1:
        notes += (
            f"Every token is repeated {a.policy.repeat} times inside the decoder (PHD-Transformer, arXiv 2504.14992); "
            "the KV cache holds what a vanilla model's holds, plus at most "
            f"{a.policy.max_hidden_entries} entries per layer. "
        )
    return notes + "The norm schemes are those of HybridNorm (arXiv 2503.04598); see `norm_schemes.py`.\n"
