"""What weight decay leaves out, read from the groups of the real program, and a resume that changes it.

Every parameter of every rank is looked at (``audit_cases.py``), the copy of a tied embedding on the last pipeline stage
included.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from phd_megatron.huggingface.checkpoint import MegatronCheckpoint
from phd_megatron.model.copy_embedding import COPY_EMBEDDING

from .conftest import TINY_MODEL, flags

pytestmark = pytest.mark.timeout(900)

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
BOTH = (True, False)
LR, DECAY = 1e-2, 0.5
THEN = ((True, True), (True, False), (False, False))  # norms and embeddings are decayed
KINDS: dict[str, list[str]] = {
    "sharded": ["--pipeline-model-parallel-size", "2"],
    "plain": ["--pipeline-model-parallel-size", "2", "--no-use-distributed-optimizer"],
    "plain-dp2-bf16": ["--no-use-distributed-optimizer", "--bf16"],
}


def options(data: Path, **more: object) -> dict[str, object]:
    return {
        **TINY_MODEL,
        **{"norm-scheme": "hybrid_star", "normalization": "LayerNorm", "add-bias-linear": True, "data-path": data},
        **{"micro-batch-size": 2, "global-batch-size": 4, "eval-iters": 0, "device": "cpu", "log-interval": 1},
        **{"lr": LR, "lr-decay-style": "constant", "weight-decay": DECAY},
        **{name.replace("_", "-"): value for name, value in more.items()},
    }


def switched(norms: bool, embeddings: bool) -> list[str]:
    return [f"--{'' if norms else 'no-'}decay-norms", f"--{'' if embeddings else 'no-'}decay-embeddings"]


@pytest.fixture(scope="module")
def groups(documents: Path, torchrun: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("groups")
    for stages in (1, 2):
        cases = []
        for norms, embeddings, tied in itertools.product(BOTH, BOTH, BOTH):
            run = options(documents, train_iters=1, pipeline_model_parallel_size=stages)
            run |= {"phd-repeat": 2, "phd-copy-embedding": "vector"}
            if not tied:
                run["untie-embeddings-and-output-weights"] = True
            directory = root / f"{stages}-{norms}-{embeddings}-{tied}"
            cases.append([str(directory), ["pretrain", *flags(run), *switched(norms, embeddings)]])
        path = root / f"cases-{stages}.json"
        path.write_text(json.dumps(cases), encoding="utf-8")
        torchrun(stages, Path(__file__).with_name("audit_cases.py"), path, timeout=400)
    return root


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("tied", BOTH)
@pytest.mark.parametrize("embeddings", BOTH)
@pytest.mark.parametrize("norms", BOTH)
def test_groups(groups: Path, norms: bool, embeddings: bool, tied: bool, stages: int) -> None:
    rows = [
        row
        for path in sorted((groups / f"{stages}-{norms}-{embeddings}-{tied}").glob("rank_*.json"))
        for row in json.loads(path.read_text("utf-8"))
    ]
    copies = [row for row in rows if row["key"] == EMBEDDING]
    assert len(copies) == (2 if tied and stages == 2 else 1)
    assert any(row["key"] == HEAD for row in rows) is not tied
    assert len(rows) > 30 and sum(row["key"].endswith(COPY_EMBEDDING) for row in rows) == 1
    for row in rows:
        wide = len(row["shape"]) > 1
        expected = embeddings if row["key"] == EMBEDDING else wide or norms
        if row["key"].endswith(COPY_EMBEDDING):
            expected = False  # its scale is that of the token embeddings it is added to
        assert row["decayed"] is expected, row["key"]


@pytest.fixture(scope="module")
def resumed(documents: Path, run_cases: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``<kind>-<norms>-<embeddings>``: one step more, from a checkpoint of the other kind of groups and of the same."""
    root = tmp_path_factory.mktemp("resumed")
    first, second = [], []
    for kind, words in KINDS.items():
        for norms in BOTH:
            saved = root / f"{kind}-{norms}"
            run = flags(options(documents, train_iters=2, exit_interval=1, save=saved))
            first.append(["pretrain", *run, *words, *switched(norms, True)])
            for then in THEN:
                end = root / f"{kind}-{norms}-then-{then[0]}-{then[1]}"
                places = flags({"load": saved, "save": end})
                second.append(["pretrain", *places, *words, *switched(*then)])
    run_cases(2, first)
    run_cases(2, second)
    return root


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norms", BOTH)
def test_a_resume_may_change_what_is_decayed(resumed: Path, kind: str, norms: bool) -> None:
    """The gradients are the same, so what a parameter loses more by decay is lr * weight_decay of what it was."""
    name = "optimizer.state.fp32_param." if kind == "plain-dp2-bf16" else ""
    before = read(resumed / f"{kind}-{norms}", name)
    ends = {then: read(resumed / f"{kind}-{norms}-then-{then[0]}-{then[1]}", name) for then in THEN}
    for (then_norms, then_embeddings), after in ends.items():
        for key, value in before.items():
            narrow = value.dim() == 1
            kept = (not then_embeddings) if key == EMBEDDING else narrow and not then_norms
            reference = ends[True, True][key]  # all is decayed
            expected = reference + (LR * DECAY * value if kept else 0.0)
            torch.testing.assert_close(
                after[key], expected, rtol=1e-6, atol=1e-6, msg=lambda text, k=key: f"{k}: {text}"
            )


def read(save: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Every parameter of a checkpoint, of the float32 ones where there are two."""
    checkpoint = MegatronCheckpoint(save)
    names = [key for key in checkpoint.tensors if "_extra_state" not in key]
    if not prefix:
        return {key: checkpoint.read(key) for key in names}
    entries = checkpoint._reader.read_metadata().state_dict_metadata
    checkpoint.tensors = {key: entries[key] for key in entries if key.startswith(prefix)}
    return {key.removeprefix(prefix): checkpoint.read(key) for key in checkpoint.tensors}
