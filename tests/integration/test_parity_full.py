"""Many models over many layouts, and ``docs/parity.md`` from the result: ``bash tests/run.sh --full``.

The families below are plain tables. Each model is run in at least six layouts of its family and each layout with at
least four models. One launch a world size and family runs all its cases.
"""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from phd_megatron.cli.parity import markdown
from phd_megatron.config.layouts import parse_layout
from phd_megatron.norm.schemes import NORM_SCHEMES
from phd_megatron.parity.compare import FLOAT32, STEPS
from phd_megatron.parity.runs import Row, run_parity

from .conftest import ROOT, TINY_MODEL
from .test_layout_parity import configuration

pytestmark = [pytest.mark.full, pytest.mark.timeout(3600)]

Models = dict[str, dict[str, object]]
#: name -> W and C; K = 1 has none of them
ATTENTION: Models = {
    "PHD": {"phd-window": 1, "phd-chunk": "null"},
    "SWA": {"phd-window": 5, "phd-chunk": "null"},
    "CSWA": {"phd-window": 5, "phd-chunk": 8},
}
DENSE: Models = {
    f"{scheme} K={repeat}" + (f" {name}" if repeat > 1 else ""): {
        "norm-scheme": scheme,
        "phd-repeat": repeat,
        **(attention if repeat > 1 else {}),
    }
    for scheme in ("pre", "hybrid", "hybrid_star")
    for repeat in (1, 2, 3)
    for name, attention in (ATTENTION.items() if repeat > 1 else [("", {})])
}
DENSE |= {
    f"{scheme} K=2 CSWA, untied": {
        "norm-scheme": scheme,
        "phd-repeat": 2,
        **ATTENTION["CSWA"],
        "untie-embeddings-and-output-weights": True,
    }
    for scheme in ("post", "pre_qk", "olmo2")
}
DENSE |= {
    f"{scheme} K={repeat} CSWA, {positions}, {embedding}": {
        **{"norm-scheme": scheme, "phd-repeat": repeat, **ATTENTION["CSWA"]},
        **{"phd-copy-positions": positions, "phd-copy-embedding": embedding},
    }
    for scheme, repeat, positions, embedding in (
        *(("hybrid_star", 2, "repeated", "vector"), ("hybrid_star", 3, "fraction", "none")),
        *(("pre", 3, "repeated", "none"), ("pre", 2, "fraction", "vector"), ("embed_norm", 2, "token", "vector")),
    )
}
DENSE_LAYOUTS = (
    *("dp1+recompute", "tp2", "tp2+sp", "pp2", "pp2+first1", "pp2+vpp2", "dp2", "dp2+overlap", "dp2+nodist"),
    *("tp2+sp+recompute", "tp2+pp2", "tp2+sp+pp2+vpp2", "pp2+vpp2+dp2+overlap", "pp4", "tp4", "tp4+sp", "tp2+sp+dp2"),
    *("pp2+last3+dp2+overlap", "tp2+sp+dp2+overlap+recompute", "dp4+overlap", "tp2+sp+pp2+vpp2+dp2+overlap"),
    *("tp2+sp+pp4", "pp4+dp2+overlap", "tp4+sp+pp2+vpp2", "tp2+pp2+dp2+nodist", "dp8+overlap"),
)
#: every norm scheme, each in all of these layouts
SCHEMES: Models = {
    f"{scheme} K=2 CSWA": {"norm-scheme": scheme, "phd-repeat": 2, **ATTENTION["CSWA"]}
    for scheme in NORM_SCHEMES
    if scheme not in ("pre", "hybrid", "hybrid_star")
}
SCHEME_LAYOUTS = ("tp2", "tp2+sp", "pp2", "pp2+vpp2", "tp2+sp+recompute", "tp2+sp+pp2")
#: slices of 12 tokens with two context-parallel ranks and of 6 with four; chunks of 6 divide them, those of 8 do not
CONTEXT: Models = {
    f"{scheme} K={repeat} {name}".replace("K=1 vanilla", "K=1"): {
        "seq-length": 48,
        "norm-scheme": scheme,
        "phd-repeat": repeat,
        "phd-window": window,
        "phd-chunk": chunk,
    }
    for scheme in ("pre", "hybrid_star")
    for repeat, name, window, chunk in (
        (1, "vanilla", 1, "null"),
        (2, "PHD", 1, "null"),
        (2, "SWA", 5, "null"),
        (2, "CSWA, chunks in slices", 5, 6),
        (3, "CSWA, chunks across slices", 5, 8),
    )
}
CONTEXT |= {
    f"{scheme} K=2 CSWA, chunks across slices": {
        **{"seq-length": 48, "norm-scheme": scheme, "phd-repeat": 2, "phd-window": 5, "phd-chunk": 8}
    }
    for scheme in ("olmo2", "pre_qkvc_post", "embed_norm")
}
CONTEXT |= {
    f"hybrid_star K={repeat} CSWA, chunks across slices, {positions}, vector": {
        **{"seq-length": 48, "norm-scheme": "hybrid_star", "phd-repeat": repeat, "phd-window": 5, "phd-chunk": 8},
        **{"phd-copy-positions": positions, "phd-copy-embedding": "vector"},
    }
    for repeat, positions in ((2, "repeated"), (3, "fraction"))
}
CONTEXT_LAYOUTS = (
    *("cp2", "cp2+p2p", "cp4", "cp4+p2p", "cp2+recompute", "tp2+cp2+p2p", "tp2+sp+cp2", "cp2+pp2", "cp2+pp2+p2p"),
    *("cp2+pp2+vpp2", "cp2+dp2+overlap", "cp2+dp2+nodist", "tp2+sp+cp2+pp2", "tp2+sp+cp2+dp2+overlap", "cp4+pp2+p2p"),
)
ROUTER: dict[str, object] = {
    **{"num-experts": 4, "moe-router-topk": 2, "moe-ffn-hidden-size": 24, "moe-router-dtype": "fp32"},
    **{"moe-router-load-balancing-type": ["aux_loss", "seq_aux_loss"], "moe-aux-loss-coeff": [0.1, 0.2]},
    **{"moe-z-loss-coeff": 0.05},
}
EXPERTS: Models = {
    f"{scheme} K={repeat}, {dispatcher}": {
        **ROUTER,
        "norm-scheme": scheme,
        "phd-repeat": repeat,
        "moe-token-dispatcher-type": dispatcher,
        "moe-layer-freq": [0, 1, 1, 1] if dispatcher == "alltoall" else 1,
        **(ATTENTION["CSWA"] if repeat > 1 else {}),
    }
    for scheme in ("pre", "hybrid_star")
    for repeat in (1, 2)
    for dispatcher in ("alltoall", "allgather")
}
EXPERTS |= {
    f"{scheme} K=2, alltoall": {**ROUTER, "norm-scheme": scheme, "phd-repeat": 2, **ATTENTION["CSWA"]}
    for scheme in ("olmo2", "post", "post_pre", "sandwich", "deepnorm")
}
EXPERTS["hybrid_star K=2, alltoall, repeated, vector"] = {
    **{**ROUTER, "norm-scheme": "hybrid_star", "phd-repeat": 2, **ATTENTION["CSWA"]},
    **{"phd-copy-positions": "repeated", "phd-copy-embedding": "vector"},
}
EXPERTS_LAYOUTS = (
    *("dp2", "ep2", "ep2+nodist", "ep4", "tp2+sp", "tp2+sp+etp1", "tp2+sp+ep2+etp1", "tp2+sp+ep2", "pp2", "pp2+ep2"),
    *("pp2+vpp2+ep2", "ep2+dp4+overlap", "cp2+ep2", "tp2+sp+cp2+ep2", "tp2+sp+pp2+ep2", "tp2+sp+pp2+vpp2+ep2+etp1"),
)
#: family -> models and layouts
FAMILIES: dict[str, tuple[Models, tuple[str, ...]]] = {
    "dense": (DENSE, DENSE_LAYOUTS),
    "norm-scheme": (SCHEMES, SCHEME_LAYOUTS),
    "context-parallel": (CONTEXT, CONTEXT_LAYOUTS),
    "mixture-of-experts": (EXPERTS, EXPERTS_LAYOUTS),
}
LAYOUTS_A_MODEL, MODELS_A_LAYOUT = 6, 4


def covered(family: str) -> dict[str, list[str]]:
    """Model -> its layouts: as many for each as give every layout its models, taken in turns."""
    models, layouts = FAMILIES[family]
    each = max(LAYOUTS_A_MODEL, -(-MODELS_A_LAYOUT * len(layouts) // len(models)))
    return {
        model: [layouts[(number * each + i) % len(layouts)] for i in range(each)] for number, model in enumerate(models)
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_model_and_every_layout_is_covered(family: str) -> None:
    models, layouts = FAMILIES[family]
    plan = covered(family)
    assert all(len(set(plan[model])) >= LAYOUTS_A_MODEL for model in models)
    for layout in layouts:
        assert sum(layout in names for names in plan.values()) >= MODELS_A_LAYOUT, layout


@pytest.fixture(scope="module")
def results(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[Row]]]:
    """Family -> model -> rows; the table is written whatever they say."""
    found = {}
    for family, (models, _) in FAMILIES.items():
        plan = covered(family)
        runs = {
            model: (configuration(corpus, options), [parse_layout(name) for name in plan[model]])
            for model, options in models.items()
        }
        found[family] = run_parity(runs, tmp_path_factory.mktemp(family), dict.fromkeys(runs, FLOAT32))
    (ROOT / "docs" / "parity.md").write_text(document(found), encoding="utf-8")
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_case_is_equal(results: dict[str, dict[str, list[Row]]], family: str) -> None:
    bad = {(model, row.layout): row for model, rows in results[family].items() for row in rows if row.status != "equal"}
    assert bad == {}


def document(found: dict[str, dict[str, list[Row]]]) -> str:
    """docs/parity.md: one line a layout with its models, and one a model with its layouts."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    cases = [row for family in found.values() for rows in family.values() for row in rows]
    equal = sum(row.status == "equal" for row in cases)
    shape = ", ".join(f"{name.replace('-', '_')} {value}" for name, value in TINY_MODEL.items())
    text = [
        "# Parity of layouts",
        "Written by `bash tests/run.sh --full`; do not edit. "
        f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}, commit {commit.strip() or 'unknown'}, "
        f"{platform.machine()} CPU with {os.cpu_count()} cores, torch {torch.__version__}, float32.",
        f"{equal} of {len(cases)} cases are equal to one rank: losses and gradient norms of {STEPS} steps and the "
        f"gradient of every parameter of the first, within {FLOAT32.value:g} relative "
        f"([what that means](parallelism.md#what-is-held-by-tests)). The numbers are the largest relative errors. "
        f"Models: {shape}.",
    ]
    for family, models in found.items():
        text += [f"## {family.capitalize()} models, by layout", by_layout(models)]
        text += [f"## {family.capitalize()} models, by model", by_model(models)]
    return "\n\n".join(part.rstrip("\n") for part in text) + "\n"


def by_layout(models: dict[str, list[Row]]) -> str:
    rows: dict[str, list[tuple[str, Row]]] = {}
    for model, results in models.items():
        for row in results:
            rows.setdefault(row.layout, []).append((model, row))
    columns = ("layout", "ranks", "models", "equal", "loss", "grad norm", "gradients", "worst parameter", "of model")
    table = []
    for layout, cases in sorted(rows.items(), key=lambda item: item[1][0][1].ranks):
        model, worst = max(cases, key=lambda case: case[1].comparison.gradient if case[1].comparison else 0.0)
        equal = sum(row.status == "equal" for _, row in cases)
        where = f"`{worst.comparison.parameter}`" if worst.comparison else ""
        numbers = largest([row for _, row in cases])
        table.append([f"`{layout}`", str(worst.ranks), str(len(cases)), str(equal), *numbers, where, model])
    return markdown(columns, table)


def by_model(models: dict[str, list[Row]]) -> str:
    columns = ("model", "layouts", "equal", "loss", "grad norm", "gradients", "which")
    table = []
    for model, rows in models.items():
        equal = sum(row.status == "equal" for row in rows)
        names = ", ".join(f"`{row.layout}`" + ("" if row.status == "equal" else f" ({row.status})") for row in rows)
        table.append([model, str(len(rows)), str(equal), *largest(rows), names])
    return markdown(columns, table)


def largest(rows: list[Row]) -> list[str]:
    found = [row.comparison for row in rows if row.comparison is not None]
    return [f"{max((getattr(c, name) for c in found), default=0):.1e}" for name in ("loss", "grad_norm", "gradient")]
