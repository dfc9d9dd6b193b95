"""Every layout gives the single-rank numbers: losses and gradient norms of three steps, every gradient of the first.

The runs and the comparison are those of ``phd-megatron parity``; tolerance (all cases): 1e-5 relative in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from phd_megatron.config.layouts import SINGLE, Layout, parse_layout
from phd_megatron.config.load import load_run_config
from phd_megatron.config.schema import RunConfig
from phd_megatron.norm.schemes import norm_plan
from phd_megatron.parity.compare import FLOAT32, GRADIENTS, METRICS
from phd_megatron.parity.runs import Row, run_parity
from phd_megatron.training.observers.gradient_dump import load_gradients

from .conftest import TINY_MODEL, flags, read_metrics

MODELS: dict[str, dict[str, object]] = {
    f"{scheme}-k{repeat}": {"norm-scheme": scheme, "phd-repeat": repeat}
    for scheme in ("pre", "hybrid_star")
    for repeat in (1, 2, 3)
}
MODELS["post-k2"] = {"norm-scheme": "post", "phd-repeat": 2}
MODELS["pre_qk-k2"] = {"norm-scheme": "pre_qk", "phd-repeat": 2}
MODELS["hybrid-k2-untied"] = {
    "norm-scheme": "hybrid",
    "phd-repeat": 2,
    "untie-embeddings-and-output-weights": True,
}
# One scheme for each thing that the others need of the code.
MODELS |= {
    f"{scheme}-k2": {"norm-scheme": scheme, "phd-repeat": 2}
    for scheme in ("olmo2", "post_pre", "embed_norm", "pre_qkvc_post", "deepnorm", "mix_ln")
}
#: copies that differ by more than the mask
TOLD_APART: dict[str, dict[str, object]] = {
    "hybrid_star-k3-repeated-vector": {
        **{"norm-scheme": "hybrid_star", "phd-repeat": 3},
        **{"phd-copy-positions": "repeated", "phd-copy-embedding": "vector"},
    },
    "pre-k2-fraction-vector": {
        **{"norm-scheme": "pre", "phd-repeat": 2, "untie-embeddings-and-output-weights": True},
        **{"phd-copy-positions": "fraction", "phd-copy-embedding": "vector"},
    },
    "embed_norm-k2-vector": {"norm-scheme": "embed_norm", "phd-repeat": 2, "phd-copy-embedding": "vector"},
}
#: RoPE for a longer context
STRETCHED: dict[str, dict[str, object]] = {
    "pre-k2-llama3": {"norm-scheme": "pre", "phd-repeat": 2, "use-rope-scaling": True, "rope-scaling-factor": 32},
    "hybrid_star-k2-yarn": {
        **{"norm-scheme": "hybrid_star", "phd-repeat": 2, "phd-copy-positions": "fraction"},
        **{"position-embedding-type": "yarn", "yarn-rotary-scaling-factor": 4},
        "yarn-original-max-position-embeddings": 12,
    },
}
MODELS |= TOLD_APART | STRETCHED
SIX, EVERY = tuple(MODELS)[:6], tuple(MODELS)
TWO = ("pre-k1", "hybrid_star-k3")
APART = "hybrid_star-k3-repeated-vector"
#: layouts that have no word: stages cut by letters, and by counting embedding and loss as layers
NAMED = {
    "pp4 with a lone head": Layout(
        "pp4 with a lone head",
        {"pipeline_model_parallel_size": 4, "pipeline_model_parallel_layout": "Et|tt|t|L"},
        ranks=4,
    ),
    "pp2+vpp3 with embedding and loss counted": Layout(
        "pp2+vpp3 with embedding and loss counted",
        {
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 3,
            "account_for_embedding_in_pipeline_split": True,
            "account_for_loss_in_pipeline_split": True,
        },
        ranks=2,
    ),
    "pp2+vpp2 in groups of 4, all transfers overlapped": Layout(
        "pp2+vpp2 in groups of 4, all transfers overlapped",
        {
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "microbatch_group_size_per_vp_stage": 4,
            "overlap_p2p_comm_warmup_flush": True,
        },
        ranks=2,
    ),
    **{
        f"{layout.name}, gradients added in the products": replace(
            layout,
            name=f"{layout.name}, gradients added in the products",
            fields={**layout.fields, "gradient_accumulation_fusion": True},
        )
        for layout in map(parse_layout, ("tp2+sp", "pp2+vpp2", "dp2+overlap"))
    },
    "dp2+overlap in buckets": Layout(
        "dp2+overlap in buckets",
        {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 3000},
        ranks=2,
    ),
}
#: which models a layout is run with
LAYOUTS: dict[str, tuple[str, ...]] = {
    "tp2": (*SIX[3:], *TOLD_APART, "post-k2", "olmo2-k2", "pre_qkvc_post-k2"),
    "tp2+sp": EVERY,
    "pp2": (*TWO, *TOLD_APART, "hybrid-k2-untied"),
    "pp2+vpp2": (*SIX, APART, "hybrid-k2-untied", "embed_norm-k2", "deepnorm-k2", "mix_ln-k2"),
    "pp2+vpp2 in groups of 4, all transfers overlapped": ("hybrid_star-k2",),
    "tp2+sp, gradients added in the products": ("hybrid_star-k2", "hybrid-k2-untied"),
    "pp2+vpp2, gradients added in the products": ("hybrid_star-k2", "hybrid-k2-untied"),
    "dp2+overlap, gradients added in the products": ("hybrid_star-k2", "hybrid-k2-untied"),
    "pp2+first1": ("hybrid_star-k2", "hybrid-k2-untied"),
    "pp2+vpp3 with embedding and loss counted": ("hybrid_star-k3", "hybrid-k2-untied"),
    "dp2": TWO,
    "dp2+overlap in buckets": (*TWO, APART),
    "dp2+nodist": (*TWO, APART),
    "tp2+sp+recompute": (*TWO, APART),
    "tp2+pp2": TWO,
    "tp2+sp+pp2+vpp2": (*TWO, *TOLD_APART, *STRETCHED, "pre-k2", "hybrid-k2-untied"),
    "pp2+vpp2+dp2+overlap": (*TWO, "hybrid-k2-untied"),
    "tp2+sp+dp2+overlap": ("hybrid_star-k3",),
    "pp4": (*TWO, "hybrid-k2-untied"),
    "pp4 with a lone head": (*TWO, APART),
    "tp4": ("hybrid_star-k3",),  # num_query_groups = 2 < TP
    "tp4+sp": (*TWO, APART, "olmo2-k2"),
}


@dataclass
class Parity:
    """(layout, model) to what became of it, and where the single-rank runs lie."""

    rows: dict[tuple[str, str], Row]
    work: Path


def configuration(corpus: Path, model: dict[str, object]) -> RunConfig:
    """A tiny model with one of MODELS' options."""
    from phd_megatron.model.transformer_config import transformer_field_types

    options = {**TINY_MODEL, "phd-window": 5, "phd-chunk": 8, "data-path": str(corpus), "micro-batch-size": 2}
    words = flags({**options, "lr": 1e-2, "device": "cpu", **model})
    return load_run_config(words, transformer_fields=transformer_field_types()).config


@pytest.fixture(scope="module")
def parity(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Parity:
    """All cases; one launch a world size."""
    layouts = {name: NAMED.get(name) or parse_layout(name) for name in LAYOUTS}
    models = {
        model: (configuration(corpus, options), [layouts[name] for name in LAYOUTS if model in LAYOUTS[name]])
        for model, options in MODELS.items()
    }
    work = tmp_path_factory.mktemp("parity")
    found = run_parity(models, work, dict.fromkeys(models, FLOAT32), timeout=420)
    return Parity({(row.layout, model): row for model, rows in found.items() for row in rows}, work)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("layout", "model"), [(layout, model) for layout in LAYOUTS for model in LAYOUTS[layout]])
def test_layout_gives_the_numbers_of_one_rank(parity: Parity, layout: str, model: str) -> None:
    row = parity.rows[layout, model]
    assert row.status == "equal", f"{row.comparison}\n{row.note}"  # whole: pytest shortens what it shows of a row


def test_what_is_compared_is_there(parity: Parity) -> None:
    """The cases are different models, and the gradients of all their norms inside attention are among those compared.

    So an option that is ignored, or a parameter that is left out of the files, would show.
    """
    losses = {}
    for model, options in MODELS.items():
        directory = parity.work / model / SINGLE.name
        steps = read_metrics(directory / METRICS)
        losses[model] = f"{steps[1]['lm_loss']:.6f}"
        gradients = load_gradients(directory / GRADIENTS / "iter_0000001")
        total = torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm()
        assert total == pytest.approx(steps[0]["grad_norm"], rel=1e-5)
        head_norms = [key for key in gradients if "self_attention" in key and "layernorm" in key]
        plan = norm_plan(str(options["norm-scheme"]), TINY_MODEL["num-layers"])
        assert len(head_norms) == sum(len(block.heads) for block in plan)
        assert all(gradients[key].norm() > 0 for key in head_norms)
        assert ("copy_embedding.weight" in gradients) == (options.get("phd-copy-embedding") == "vector")
        assert all(row.norm() > 0 for row in gradients.get("copy_embedding.weight", ()))
    assert len(set(losses.values())) == len(losses)
