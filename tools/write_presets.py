"""Write ``examples/presets/*.yaml`` and ``docs/presets.md`` from the presets' table; ``--check`` only compares."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

import yaml

from phd_megatron.config.catalog import fields, sections
from phd_megatron.config.load import merge_layers
from phd_megatron.config.presets import OURS, PRESETS, Preset
from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import RunConfig
from phd_megatron.console.tables import short
from phd_megatron.phd.kv_policy import KVPolicy
from phd_megatron.planning.peak import ASSUMED_DEVICE, ASSUMED_MFU, PEAK_TFLOPS
from phd_megatron.planning.run_plan import RunPlan, plan_run

ROOT = Path(__file__).resolve().parents[1]
BYTES = 257  # vocabulary of the byte tokenizer, which tiny presets are meant for
NODE = 8

DOCUMENT_HEAD = """\
# Presets

`--preset NAME` gives a run the sizes and the recipe of a paper's model; `--preset A,B` takes A and then B on top, and a
saved configuration, a YAML file and flags win over both. What is left to say is where the data and the checkpoints are:

```bash
torchrun --nproc-per-node 8 -m phd_megatron pretrain --preset dense-550m \\
    --data-path PREFIX --tokenizer DIRECTORY --save runs/550m --load runs/550m --save-interval 1000
```

`phd-megatron plan --preset NAME` says what a run costs. Every whole preset is also a file to start from, in
[`examples/presets/`](../examples/presets). This page and those files are written by `tools/write_presets.py` from
[`config/presets.py`](../phd_megatron/config/presets.py); a test compares them.

"""


def resolved(values: dict[str, Any]) -> RunConfig:
    """The run that a preset alone makes."""
    config = merge_layers([(values, "preset")]).config
    resolve(config)
    config.model.vocab_size = config.model.vocab_size or BYTES
    return config


def planned(preset: Preset) -> tuple[RunConfig, RunPlan]:
    """A preset's run on one node, or on one rank for tiny ones."""
    config = resolved(dict(preset.values))
    training = config.training
    samples = training.train_samples or (training.train_iters or 0) * (training.global_batch_size or 0)
    return config, plan_run(config, samples, NODE if preset.tokens else 1)


def kind(config: RunConfig) -> str:
    """K, W and C as the paper writes them."""
    model = config.model
    return KVPolicy.from_options(model.phd_repeat, model.phd_window, model.phd_chunk)[0].name


def gigabytes(number: int) -> str:
    return f"{number / 2**30:.1f} GiB"


def size(plan: RunPlan) -> str:
    """Parameters, and the active ones where they are fewer."""
    active = plan.active_parameters
    return short(plan.parameters) + (f", {short(active)} active" if active < plan.parameters else "")


def hours(plan: RunPlan) -> float:
    return plan.device_hours(PEAK_TFLOPS[ASSUMED_DEVICE], ASSUMED_MFU)


def example(name: str, preset: Preset) -> str:
    """The YAML file of one preset, with what it costs and what it reproduces."""
    _, plan = planned(preset)
    time = (
        f", {hours(plan):,.0f} {ASSUMED_DEVICE} hours at an assumed MFU of {ASSUMED_MFU:.0%}" if preset.tokens else ""
    )
    ranks = f"{plan.ranks} GPUs" if preset.tokens else "one rank"
    lines = [
        f"{preset.title}: {size(plan)} parameters, {short(plan.tokens)} tokens. Source: {preset.paper}.",
        f"Reproduces: {preset.reproduces}.",
        f"Costs: {plan.flops_per_token:.3g} FLOPs a token, {plan.flops:.3g} in all{time}; about "
        f"{gigabytes(plan.memory.total)} a rank on {ranks} (estimate without recomputation, before what the allocator "
        "and communication add).",
        *(f"Note: {note}." for note in preset.notes),
        f"The same as --preset {name}; written by tools/write_presets.py, so change the table and not this file.",
    ]
    comment = "\n".join(
        wrapped for line in lines for wrapped in textwrap.wrap(line, 117, initial_indent="# ", subsequent_indent="#   ")
    )
    return comment + "\n" + yaml.safe_dump(by_section(dict(preset.values)), sort_keys=False)


def by_section(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Flat fields in the sections of a run file; fields of ``TransformerConfig`` stand below ``model``."""
    nested: dict[str, dict[str, Any]] = {section: {} for section in sections()}
    for name, value in values.items():
        info = fields().get(name)
        nested["model" if info is None else info.section][name] = value
    return {section: content for section, content in nested.items() if content}


def document() -> str:
    """``docs/presets.md``."""
    lines = [DOCUMENT_HEAD + "## Models", ""]
    head = ["preset", "parameters", "layers x hidden, FFN", "heads / KV heads", "copies", "tokens", "FLOPs a token"]
    head += [f"{ASSUMED_DEVICE} hours", "memory a GPU"]
    rows = []
    whole = {name: preset for name, preset in PRESETS.items() if preset.is_whole}
    for name, preset in whole.items():
        config, plan = planned(preset)
        model = config.model
        shape = f"{model.num_layers} x {model.hidden_size}, {model.ffn_hidden_size}"
        rows.append(
            [
                f"[`{name}`](../examples/presets/{name}.yaml)",
                size(plan),
                shape,
                f"{model.num_attention_heads} / {model.num_query_groups}",
                kind(config),
                short(plan.tokens),
                f"{plan.flops_per_token:.3g}",
                f"{hours(plan):,.0f}" if preset.tokens else "",
                gigabytes(plan.memory.total) if preset.tokens else "",
            ]
        )
    lines += table(head, rows)
    lines += [
        "",
        *textwrap.wrap(
            f"FLOPs are those of training, forward and backward, and of original tokens ({ref('planning/flops.py')}). "
            f"Hours assume {ASSUMED_MFU:.0%} of {PEAK_TFLOPS[ASSUMED_DEVICE]:g} TFLOP/s (dense bf16); that share is a "
            "convention, not a measurement. Memory is an estimate for one node of eight GPUs, without recomputation "
            f"and without what the allocator and communication add ({ref('planning/memory.py')}).",
            120,
        ),
        "",
        "## What each reproduces, and what was taken where a paper is open",
        "",
    ]
    for name, preset in whole.items():
        if preset.paper != OURS:
            text = "; ".join([f"**`{name}`** ({preset.paper}): {preset.reproduces}", *preset.notes])
            lines += textwrap.wrap(f"- {text}.", 120, subsequent_indent="  ", break_on_hyphens=False)
    lines += ["", "No number of a paper has been reproduced with these presets yet.", ""]
    lines += ["## Parts, to combine with a model", ""]
    parts = [[f"`{name}`", p.title, p.reproduces] for name, p in PRESETS.items() if not p.is_whole]
    lines += table(["preset", "copies", "from"], parts)
    return "\n".join(lines) + "\n"


def ref(path: str) -> str:
    return f"[`{path}`](../phd_megatron/{path})"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file differs")
    options = parser.parse_args(argv)
    files = {ROOT / f"examples/presets/{n}.yaml": example(n, p) for n, p in PRESETS.items() if p.is_whole}
    files[ROOT / "docs/presets.md"] = document()
    stale = [path for path, text in files.items() if not path.exists() or path.read_text("utf-8") != text]
    stale += [path for path in (ROOT / "examples/presets").glob("*.yaml") if path not in files]
    if options.check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what the table says; run python tools/write_presets.py")
        return 1 if stale else 0
    (ROOT / "examples/presets").mkdir(exist_ok=True)
    for path, text in files.items():
        path.write_text(text, "utf-8")
    for path in stale:
        if path not in files:
            path.unlink()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
