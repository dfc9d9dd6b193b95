"""DeepSpeed's ZeRO gives the numbers of Megatron-Core's engine, and each goes on from the other's checkpoints.

Runs of the real program under torchrun. Against Megatron-Core's engine in the same layout, in float32: losses and
gradient norms of three steps and every gradient of the first within 1e-6, and what the steps of a run change of each
parameter and moment within 1e-4 in norm. In bfloat16, where sums round at other places: the tolerance of
``phd-megatron parity``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from phd_megatron.checkpoint.reader import CheckpointReader
from phd_megatron.config.layouts import Layout, parse_layout
from phd_megatron.config.load import load_run_config
from phd_megatron.config.schema import RunConfig
from phd_megatron.parity.compare import FLOAT32, HALF, Tolerance, compare
from phd_megatron.parity.runs import Row, run_parity

from .conftest import TINY_MODEL, flags, read_metrics, run_program

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
pytestmark = pytest.mark.timeout(1200)

SAME = Tolerance("float32 in one layout", 1e-6, 1e-6)
UPDATE = 1e-4

HOST = {"device": "cpu"}
#: DeepSpeed's files; buckets of a few parameters, so that there are several
FILES: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1, "reduce_bucket_size": 3000},
    "zero2": {"stage": 2, "reduce_bucket_size": 3000, "overlap_comm": False},
    "zero3": {"stage": 3, "reduce_bucket_size": 3000, "stage3_param_persistence_threshold": 40},
    "zero2-states-on-host": {"stage": 2, "offload_optimizer": HOST},
    "zero3-all-on-host": {
        **{"stage": 3, "offload_optimizer": HOST, "offload_param": HOST},
        **{"stage3_param_persistence_threshold": "auto", "sub_group_size": 5000},
    },
}
EXPERTS: dict[str, object] = {
    **{"num-experts": 4, "moe-router-topk": 2, "moe-ffn-hidden-size": 24, "moe-layer-freq": [0, 1, 1, 1]},
    **{"moe-token-dispatcher-type": "alltoall", "moe-aux-loss-coeff": 0.05, "moe-router-dtype": "fp32"},
}
STAR: dict[str, object] = {"norm-scheme": "hybrid_star", "phd-repeat": 2, "phd-copy-embedding": "vector"}
MODELS: dict[str, dict[str, object]] = {
    "hybrid_star-k2": STAR,
    "pre-k1": {"norm-scheme": "pre", "phd-repeat": 1, "untie-embeddings-and-output-weights": True},
    # Norms over all heads, which tensor-parallel ranks share.
    "olmo2-k3": {"norm-scheme": "olmo2", "phd-repeat": 3},
    "experts-k2": {**STAR, **EXPERTS},
    "hybrid_star-k2-bf16": {**STAR, "bf16": True},
    "pre-k2-documents": {
        "norm-scheme": "pre",
        "phd-repeat": 2,
        "reset-attention-mask": True,
        "reset-position-ids": True,
    },
}
#: layout -> file -> models
CASES: dict[str, dict[str, tuple[str, ...]]] = {
    "dp2": {
        "zero1": tuple(MODELS),
        "zero2": ("hybrid_star-k2", "experts-k2", "hybrid_star-k2-bf16"),
        "zero3": tuple(MODELS),
        "zero2-states-on-host": ("hybrid_star-k2", "pre-k2-documents"),
        "zero3-all-on-host": ("hybrid_star-k2", "experts-k2", "hybrid_star-k2-bf16"),
    },
    "tp2": {"zero1": ("pre-k1",), "zero3": ("hybrid_star-k2", "olmo2-k3")},
    "tp2+sp": {
        "zero2": ("hybrid_star-k2", "olmo2-k3", "experts-k2"),
        "zero3": ("pre-k1", "hybrid_star-k2", "pre-k2-documents"),
    },
    "cp2": {"zero2": ("hybrid_star-k2", "experts-k2"), "zero3": ("olmo2-k3", "pre-k2-documents")},
}
NAMES = [(layout, file, model) for layout, files in CASES.items() for file, models in files.items() for model in models]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("deepspeed")
    for name, zero in FILES.items():
        (directory / f"{name}.json").write_text(json.dumps({"zero_optimization": zero, "gradient_clipping": "auto"}))
    return {name: directory / f"{name}.json" for name in FILES}


def options(data: Path, model: Mapping[str, object]) -> dict[str, object]:
    fixed = {"phd-window": 5, "phd-chunk": 8, "data-path": data, "micro-batch-size": 2, "lr": 1e-2, "device": "cpu"}
    # The two engines divide by the tokens at other places. AdamW's first update makes a step of that rounding where a
    # gradient is of epsilon's size, which later norms show: 1.2e-6 with 1e-5. Most elements are a hundred times this.
    fixed["adam-eps"] = 1e-4
    return {**TINY_MODEL, **fixed, **model}


def configuration(data: Path, model: Mapping[str, object]) -> RunConfig:
    from phd_megatron.model.transformer_config import transformer_field_types

    return load_run_config(flags(options(data, model)), transformer_fields=transformer_field_types()).config


@pytest.fixture(scope="module")
def parity(documents: Path, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """All cases, each layout with Megatron-Core's engine too; one launch."""
    models = {}
    for model, its in MODELS.items():
        layouts = []
        for name, by_file in CASES.items():
            plain = parse_layout(name)
            mine = [file for file, models_of in by_file.items() if model in models_of]
            layouts += [plain] if mine else []
            for file in mine:
                fields = {**plain.fields, "deepspeed": True, "deepspeed_config": str(files[file])}
                layouts.append(Layout(f"{name} {file}", fields, plain.ranks))
        models[model] = (configuration(documents, its), layouts)
    work = tmp_path_factory.mktemp("parity")
    tolerances = {model: HALF if its.get("bf16") else FLOAT32 for model, its in MODELS.items()}
    found = run_parity(models, work, tolerances, timeout=900, keep=True)
    return work, {(row.layout, model): row for model, rows in found.items() for row in rows}


@pytest.mark.parametrize(("layout", "file", "model"), NAMES)
def test_zero_gives_the_numbers_of_the_other_engine(
    parity: tuple[Path, dict[tuple[str, str], Row]], layout: str, file: str, model: str
) -> None:
    work, rows = parity
    row = rows[f"{layout} {file}", model]
    assert row.status == "equal", f"{row.comparison}\n{row.note}"
    if MODELS[model].get("bf16"):
        return
    found = compare(work / model / layout, work / model / row.layout, SAME)
    assert found.within(SAME), found


# ---------------------------------------------------------------- checkpoints

STEPS, INTERRUPTED = 4, 2
#: case -> (model, what saves, what goes on): an engine and its options
MEGATRON: dict[str, object] = {"no-deepspeed": True, "use-distributed-optimizer": True}
RESUMES: dict[str, tuple[str, str | None, str | None]] = {
    "zero2 to Megatron-Core": ("hybrid_star-k2", "zero2", None),
    "Megatron-Core to zero3": ("hybrid_star-k2", None, "zero3"),
    "zero3 to zero1": ("hybrid_star-k2", "zero3", "zero1"),
    "zero3 on the host to Megatron-Core, experts": ("experts-k2", "zero3-all-on-host", None),
    "Megatron-Core to zero2, experts": ("experts-k2", None, "zero2"),
    "zero3 to itself, bfloat16": ("hybrid_star-k2-bf16", "zero3", "zero3"),
    "zero1 to itself, bfloat16": ("hybrid_star-k2-bf16", "zero1", "zero1"),
    "zero2 to Megatron-Core, bfloat16": ("hybrid_star-k2-bf16", "zero2", None),
}


@pytest.fixture(scope="module")
def resumes(
    documents: Path, files: dict[str, Path], run_cases: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """``whole`` and interrupted runs of each model on two ranks; a directory a case."""
    root = tmp_path_factory.mktemp("resumes")

    def engine(file: str | None) -> dict[str, object]:
        return MEGATRON if file is None else {"deepspeed": True, "deepspeed_config": files[file]}

    def start(model: str, name: str, file: str | None, **more: object) -> list[str]:
        run = {
            **{"global-batch-size": 8, "train-iters": STEPS, "eval-iters": 2, "log-interval": 1},
            **{"metrics-file": root / f"{name}.jsonl", "decoupled-lr": 5e-3},
        }
        named = {key.replace("_", "-"): value for key, value in more.items()}
        return ["pretrain", *flags({**options(documents, MODELS[model]), **run, **engine(file), **named})]

    first, then = [], []
    for model, file in sorted({(model, file) for model, file, _ in RESUMES.values()}, key=str):
        name = f"{model} {file}"
        first.append(start(model, name, file, save=root / name, exit_interval=INTERRUPTED))
    for model in sorted({model for model, _, _ in RESUMES.values()}):
        first.append(start(model, f"{model} whole", None, save=root / f"{model} whole"))
    for number, (model, file, other) in enumerate(RESUMES.values()):
        then.append(start(model, str(number), other, load=root / f"{model} {file}", save=root / str(number)))
    run_cases(2, first)
    run_cases(2, then)
    return root


@pytest.mark.parametrize("case", RESUMES)
def test_either_engine_goes_on_from_the_others_checkpoint(resumes: Path, case: str) -> None:
    model, _, _ = RESUMES[case]
    half = bool(MODELS[model].get("bf16"))
    whole = read_metrics(resumes / f"{model} whole.jsonl")[INTERRUPTED:]
    continued = read_metrics(resumes / f"{list(RESUMES).index(case)}.jsonl")
    assert [line["iteration"] for line in continued] == [*range(INTERRUPTED + 1, STEPS + 1)]
    for expected, found in zip(whole, continued, strict=True):
        for name in ("iteration", "consumed_samples", "learning_rate"):
            assert found[name] == expected[name]
        assert found["lm_loss"] == pytest.approx(expected["lm_loss"], rel=2e-2 if half else 1e-6)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=3e-2 if half else 2e-5)
    assert continued[-1]["validation_loss"] == pytest.approx(whole[-1]["validation_loss"], rel=2e-2 if half else 1e-6)


def tensors(directory: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    from torch.distributed.checkpoint import state_dict_loader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = CheckpointReader(directory / f"iter_{iteration:07d}")
    entries = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    state_dict_loader.load(state, storage_reader=reader, no_dist=True)
    return state


@pytest.mark.parametrize("case", [case for case, (model, *_) in RESUMES.items() if "bf16" not in model])
def test_updates_and_moments_are_those_of_the_other_engine(resumes: Path, case: str) -> None:
    """Of each parameter and moment: what the steps since the interruption changed."""
    model, file, _ = RESUMES[case]
    whole = tensors(resumes / f"{model} whole", STEPS)
    found = tensors(resumes / str(list(RESUMES).index(case)), STEPS)
    before = tensors(resumes / f"{model} {file}", INTERRUPTED)
    names = {name for name in whole if not name.startswith(("optimizer.state.param.", "optimizer.state.fp32_param."))}
    assert names <= found.keys()
    assert any("exp_avg_sq" in name for name in names)
    for name in names:
        change = (whole[name] - before[name]).double().norm()
        assert change > 0, name
        assert (found[name] - whole[name]).double().norm() <= UPDATE * change, name


def test_a_checkpoint_of_zero_is_evaluated_exported_and_generated_from(
    resumes: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    """By programs that need no DeepSpeed, when the file is gone; a resume says that it is."""
    files["zero2"].rename(tmp_path / "elsewhere.json")
    try:
        read(resumes, tmp_path)
    finally:
        (tmp_path / "elsewhere.json").rename(files["zero2"])


def read(resumes: Path, tmp_path: Path) -> None:
    saved = resumes / "hybrid_star-k2 zero2" / f"iter_{INTERRUPTED:07d}"
    for command in (
        ("evaluate", "--checkpoint", saved, "--num-samples", 8, "--device", "cpu"),
        ("export", "--checkpoint", saved, "--output", tmp_path / "hf"),
        ("generate", "--checkpoint", tmp_path / "hf", "--prompt", "2 times", "--max-new-tokens", 3),
    ):
        done = run_program(*command)
        assert done.returncode == 0, done.stdout
    done = run_program("pretrain", "--load", saved.parent, "--train-iters", 5)
    assert done.returncode == 2 and "zero2.json: No such file" in done.stdout, done.stdout


def test_a_batch_that_grows(
    documents: Path, files: dict[str, Path], run_cases: Callable[..., str], tmp_path: Path
) -> None:
    """The number of micro-batches changes, and with it what DeepSpeed would call gradient accumulation."""
    cases = []
    for name, engine in (("plain", {}), ("zero2", {"deepspeed": True, "deepspeed_config": files["zero2"]})):
        run = {"rampup-batch-size": [4, 4, 24], "global-batch-size": 12, "train-samples": 48, "eval-iters": 0}
        run |= {"log-interval": 1, "metrics-file": tmp_path / f"{name}.jsonl", **engine}
        cases.append(["pretrain", *flags({**options(documents, STAR), **run})])
    run_cases(2, cases)
    plain, zero = (read_metrics(tmp_path / f"{name}.jsonl") for name in ("plain", "zero2"))
    assert len({line["global_batch_size"] for line in plain}) == 3
    for expected, found in zip(plain, zero, strict=True):
        assert found["consumed_samples"] == expected["consumed_samples"]
        assert found["lm_loss"] == pytest.approx(expected["lm_loss"], rel=1e-6)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


def test_the_start_says_who_updates_and_the_checkpoint_who_did(
    documents: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    run = {**options(documents, STAR), "train-iters": 1, "eval-iters": 0, "save": tmp_path / "run"}
    done = run_program("pretrain", *flags({**run, "deepspeed": True, "deepspeed_config": files["zero3-all-on-host"]}))
    assert done.returncode == 0, done.stdout
    assert "DeepSpeed ZeRO-3, states and parameters on the host" in done.stdout
    (written,) = (tmp_path / "run").glob("iter_*/run_config.yaml")
    assert "deepspeed: true" in written.read_text("utf-8")


def test_a_step_whose_gradients_are_not_finite_ends_the_run(
    documents: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    run = {**options(documents, STAR), "lr": 1e30, "lr-decay-style": "constant", "train-iters": 5, "eval-iters": 0}
    run |= {"save": tmp_path / "run", "deepspeed": True, "deepspeed_config": files["zero2"]}
    done = run_program("pretrain", *flags(run))
    assert done.returncode == 2, done.stdout
    assert "diverged" in done.stdout and "the gradient norm of iteration" in done.stdout
    assert not list((tmp_path / "run").glob("iter_*"))


def test_without_the_sums_over_tensor_ranks_the_numbers_are_others(
    documents: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    """So the comparison above sees them."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from phd_megatron.runtime.context import install_backend\n"
        "install_backend('cpu')\n"
        "from phd_megatron.parity import worker\n"
        "from phd_megatron.training import zero_engine\n"
        "zero_engine.sum_over_tensor_ranks = lambda model, group: None\n"
        "worker.main(sys.argv[1])\n"
    )
    layout = parse_layout("tp2+sp")
    fields = {**layout.fields, "deepspeed": True, "deepspeed_config": str(files["zero2"])}
    (tmp_path / "work").mkdir()
    found = run_parity(
        {"": (configuration(documents, STAR), [Layout("without", fields, 2)])},
        tmp_path / "work",
        {"": FLOAT32},
        worker=[str(program)],
        timeout=300,
    )
    (row,) = found[""]
    assert row.status == "differs"
