"""Context parallelism through the real program: the numbers of one rank, what is sent, and what must not go missing.

Losses of three steps and of an evaluation, gradient norms, and every gradient of the first step are compared with one
rank's. Documents end inside the samples and the end-of-document token carries no loss, so the token counts of the
context-parallel ranks differ. Tolerance (all cases): 1e-5 relative in float32, as in ``test_layout_parity.py``.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from phd_megatron.parity.compare import FLOAT32, compare
from phd_megatron.phd.kv_policy import KVPolicy

from .conftest import TINY_MODEL, flags, read_metrics

LENGTH, MICRO_BATCH = 48, 2  # slices of 12 tokens with 2 ranks, of 6 with 4

MODELS: dict[str, tuple[str, KVPolicy]] = {
    "vanilla": ("pre", KVPolicy(1)),
    "phd": ("pre", KVPolicy(2, 1)),
    "cswa-in-slice": ("hybrid_star", KVPolicy(2, 5, 6)),  # chunks divide every slice: nothing hidden travels
    "cswa-across": ("hybrid_star", KVPolicy(3, 4, 8)),
    "swa": ("pre", KVPolicy(2, 5)),
    "told-apart": ("hybrid_star", KVPolicy(2, 4, 8)),
    "stretched": ("hybrid_star", KVPolicy(2, 4, 8)),
}
#: options of one model: positions of copies are those of the whole sequence, not of a slice
FURTHER: dict[str, dict[str, object]] = {
    "told-apart": {"phd-copy-positions": "repeated", "phd-copy-embedding": "vector"},
    "stretched": {
        **{"phd-copy-positions": "fraction", "position-embedding-type": "yarn", "yarn-rotary-scaling-factor": 4},
        **{"yarn-original-max-position-embeddings": 12, "yarn-beta-fast": 4, "rotary-base": 500},
    },
}
P2P = {"cp-comm-type": "p2p"}
CP2 = {"context-parallel-size": 2}
CP4 = {"context-parallel-size": 4}
TP2 = {"tensor-model-parallel-size": 2}
ALL = tuple(MODELS)[:-1]
ACROSS = ("cswa-across", "swa", "told-apart")
LAYOUTS: dict[str, tuple[int, tuple[str, ...], dict[str, object]]] = {
    "single": (1, tuple(MODELS), {}),
    "cp2": (2, tuple(MODELS), CP2),
    "cp2+p2p": (2, ALL, CP2 | P2P),
    "cp2+reference": (2, ACROSS, CP2 | {"phd-attention-backend": "reference"}),
    "cp2+no-pruning": (2, ("cswa-across",), CP2 | {"no-phd-last-layer-pruning": True}),
    "cp2+full-recompute": (
        2,
        ACROSS,
        CP2 | P2P | {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1},
    ),
    "cp2+core-recompute": (2, ACROSS, CP2 | {"recompute-granularity": "selective", "recompute-modules": "core_attn"}),
    "cp4": (4, ALL, CP4),
    "cp4+p2p": (4, ALL, CP4 | P2P),
    "cp2+tp2": (4, ACROSS, CP2 | TP2 | P2P),
    "cp2+tp2+sp": (4, ALL, CP2 | TP2 | {"sequence-parallel": True}),
    "cp2+pp2": (4, ACROSS, CP2 | {"pipeline-model-parallel-size": 2}),
    "cp2+pp2+p2p": (4, ACROSS, CP2 | P2P | {"pipeline-model-parallel-size": 2}),
    "cp2+dp2+overlap": (4, ACROSS, CP2 | {"overlap-grad-reduce": True, "overlap-param-gather": True}),
    "cp2+dp2+no-distopt": (4, ("swa",), CP2 | P2P | {"no-use-distributed-optimizer": True}),
}
BROKEN = {"halo": "swa", "zigzag": "vanilla", "loss": "vanilla"}
SAVED = "swa"  #: saved after two steps with CP2, continued under each of these with four ranks
CONTINUED = {"cp4": CP4 | P2P, "cp2+tp2": CP2 | TP2, "dp4": {}}
PAIRS = [(layout, model) for layout, (_, models, _) in LAYOUTS.items() if layout != "single" for model in models]


@dataclass
class Results:
    """``root/<layout>/<model>/{metrics.jsonl,gradients/}`` of every case, and what the program printed in it."""

    root: Path
    printed: dict[str, str]


def arguments(corpus: Path, directory: Path, model: str, options: dict[str, object]) -> list[str]:
    scheme, policy = MODELS[model]
    chunk = {} if policy.chunk is None else {"phd-chunk": policy.chunk}
    values = {
        **TINY_MODEL,
        **{"seq-length": LENGTH, "norm-scheme": scheme, "phd-repeat": policy.repeat, "phd-window": policy.window},
        **chunk,
        **FURTHER.get(model, {}),
        **{"data-path": str(corpus), "split": "90,10,0", "eod-mask-loss": True, "device": "cpu"},
        **{"micro-batch-size": MICRO_BATCH, "global-batch-size": 8, "train-iters": 3, "lr": 1e-2, "log-interval": 1},
        **{"eval-iters": 1, "eval-interval": 3},
        **{"metrics-file": str(directory / "metrics.jsonl"), "dump-gradients-dir": str(directory / "gradients")},
        **options,
    }
    return ["pretrain", *flags(values)]


@pytest.fixture(scope="module")
def results(
    documents: Path,
    torchrun: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Results:
    """One launch a world size."""
    root, printed = tmp_path_factory.mktemp("context_parallel"), {}
    for world_size in (1, 2, 4):
        cases: list[tuple[str, str | None, list[str]]] = []
        for layout, (ranks, models, options) in LAYOUTS.items():
            if ranks == world_size:
                for model in models:
                    words = arguments(documents, root / layout / model, model, options)
                    cases.append((f"{layout}/{model}", None, words))
        if world_size == 2:
            for what, model in BROKEN.items():
                name = f"without-{what}"
                cases.append((f"{name}/{model}", what, arguments(documents, root / name / model, model, CP2)))
            saving = {**CP2, "save": str(root / "saved"), "exit-interval": 2}
            cases.append(("saved", None, arguments(documents, root / "half", SAVED, saving)))
        if world_size == 4:
            for layout, options in CONTINUED.items():
                name = f"continued-{layout}"
                places = {"load": str(root / "saved"), "save": str(root / name / "save")}
                words = arguments(documents, root / name, SAVED, {**options, **places})
                words[words.index("--micro-batch-size") + 1] = "1"
                cases.append((name, None, words))
        path = root / f"cases{world_size}.json"
        path.write_text(json.dumps(cases), encoding="utf-8")
        program = Path(__file__).parent / "context_parallel_cases.py"
        output = torchrun(world_size, program, path, timeout=900).stdout
        parts = re.split(r"^CASE (\S+)$", output, flags=re.MULTILINE)
        printed |= dict(zip(parts[1::2], parts[2::2], strict=True))
    return Results(root, printed)


@pytest.mark.timeout(2400)
@pytest.mark.parametrize(("layout", "model"), PAIRS)
def test_ranks_that_share_a_sequence_give_the_numbers_of_one(results: Results, layout: str, model: str) -> None:
    reference, other = results.root / "single" / model, results.root / layout / model
    expected, found = read_metrics(reference / "metrics.jsonl"), read_metrics(other / "metrics.jsonl")
    assert len(expected) == len(found) == 3
    assert [line["consumed_samples"] for line in found] == [line["consumed_samples"] for line in expected]
    assert found[-1]["validation_loss"] == pytest.approx(expected[-1]["validation_loss"], rel=FLOAT32.value)
    comparison = compare(reference, other, FLOAT32)
    assert comparison.within(FLOAT32), comparison


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_left_out_shows(results: Results, what: str) -> None:
    """The comparison above would fail without the halo, the zigzag order, or the global token count."""
    model = BROKEN[what]
    comparison = compare(results.root / "single" / model, results.root / f"without-{what}" / model, FLOAT32)
    print(f"without {what}: worst gradient off by {comparison.gradient:.1e}")
    assert comparison.gradient > 100 * FLOAT32.value


@pytest.mark.parametrize("layout", CONTINUED)
def test_a_checkpoint_continues_under_another_layout(results: Results, layout: str) -> None:
    """Same samples, parameters and optimizer states: step 3 is that of the run that was never stopped."""
    whole = read_metrics(results.root / "single" / SAVED / "metrics.jsonl")
    half = read_metrics(results.root / "half" / "metrics.jsonl")
    rest = read_metrics(results.root / f"continued-{layout}" / "metrics.jsonl")
    assert [m["iteration"] for m in (*half, *rest)] == [1, 2, 3]
    for found, expected in zip((*half, *rest), whole, strict=True):
        for name in ("consumed_samples", "lm_loss", "grad_norm", "learning_rate"):
            assert found[name] == pytest.approx(expected[name], rel=FLOAT32.value), name
    assert rest[0]["validation_loss"] == pytest.approx(whole[2]["validation_loss"], rel=FLOAT32.value)


def sent_bytes(printed: str) -> dict[int, dict[str, int]]:
    """What the program counted, by layer and kind of transfer."""
    lines = re.findall(r"bytes sent in layer (\d+) per micro-batch: (.+)", printed)
    return {
        int(layer): {kind: int(count) for kind, count in (item.split() for item in kinds.split(", "))}
        for layer, kinds in lines
    }


@pytest.mark.parametrize("model", ALL)
@pytest.mark.parametrize("layout", ["cp2", "cp2+p2p", "cp4", "cp4+p2p"])
def test_bytes_sent_are_the_formula(results: Results, layout: str, model: str) -> None:
    """PHD sends what vanilla sends plus the halo, however large K is."""
    size = int(layout[2])
    policy = MODELS[model][1]
    width = TINY_MODEL["hidden-size"] // TINY_MODEL["num-attention-heads"]
    entry = 2 * TINY_MODEL["num-query-groups"] * width * MICRO_BATCH * torch.float32.itemsize
    traffic = policy.context_parallel_traffic(LENGTH, size, 0)
    vanilla = KVPolicy(1).context_parallel_traffic(LENGTH, size, 0)
    formula = (traffic.forward + traffic.backward) * entry
    halo = (traffic.halo_sent + traffic.halo_returned) * entry
    layers = sent_bytes(results.printed[f"{layout}/{model}"])
    assert list(layers) == list(range(1, TINY_MODEL["num-layers"] + 1))
    for layer, sent in layers.items():
        print(f"{layout} {policy.name}, layer {layer}: sent {sum(sent.values())} bytes {sent}, formula {formula}")
        assert sum(sent.values()) == formula == (vanilla.forward + vanilla.backward) * entry + halo
    assert (halo > 0) == (model in ACROSS)


def test_one_rank_says_nothing_about_exchange(results: Results) -> None:
    assert sent_bytes(results.printed["single/swa"]) == {}


def test_models_differ(results: Results) -> None:
    losses = {read_metrics(results.root / "single" / model / "metrics.jsonl")[1]["lm_loss"] for model in MODELS}
    assert len({f"{loss:.6f}" for loss in losses}) == len(MODELS)
