"""Presets of the papers: valid, as large as the papers say, and written out as the table says."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from phd_megatron.config.architecture import padded_vocab_size
from phd_megatron.config.load import load_run_config
from phd_megatron.config.presets import PRESETS, preset_values
from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import ParallelConfig, RunConfig
from phd_megatron.errors import UserError
from phd_megatron.norm.schemes import NORM_SCHEMES
from phd_megatron.planning.parameters import count_parameters
from phd_megatron.runtime.context import Runtime

ROOT = Path(__file__).resolve().parents[2]
WHOLE = [name for name, preset in PRESETS.items() if preset.is_whole]


@pytest.fixture(scope="module")
def runtime():
    with Runtime.start(ParallelConfig(device="cpu"), verbose=False) as started:
        yield started


def load(*argv: str) -> RunConfig:
    from phd_megatron.model.transformer_config import transformer_field_types

    config = load_run_config(list(argv), transformer_fields=transformer_field_types()).config
    resolve(config)
    config.model.vocab_size = config.model.vocab_size or 257
    return config


def built_parameters(config: RunConfig) -> int:
    from phd_megatron.model.build import build_model

    assert config.model.vocab_size
    (model,) = build_model(config, config.model.vocab_size, torch.device("meta"))
    parameters = list(model.parameters())
    assert all(parameter.device.type == "meta" for parameter in parameters)
    return sum(parameter.numel() for parameter in parameters)


def counted(config: RunConfig):
    assert config.model.vocab_size
    return count_parameters(
        config.model, padded_vocab_size(config.model.vocab_size, config.model.make_vocab_size_divisible_by)
    )


@pytest.mark.parametrize("name", WHOLE)
def test_counts_agree_with_the_built_model_and_with_the_paper(name: str, runtime: Runtime) -> None:
    config = load("--preset", name, "--tensor-model-parallel-size", "1", "--expert-model-parallel-size", "1")
    config.parallel.sequence_parallel = False
    parameters = counted(config)
    assert built_parameters(config) == parameters.total
    if PRESETS[name].parameters is not None:
        total, active = PRESETS[name].parameters
        assert parameters.total == pytest.approx(total, rel=0.02)
        assert parameters.active == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize("name", NORM_SCHEMES)
@pytest.mark.parametrize(
    "options",
    [["--preset", "tiny-moe"], ["--preset", "tiny-dense", "--normalization", "LayerNorm", "--add-bias-linear"]],
    ids=["experts", "LayerNorm-biases"],
)
def test_counts_of_norm_schemes_and_biases(name: str, options: list[str], runtime: Runtime) -> None:
    config = load(*options, "--norm-scheme", name)
    assert built_parameters(config) == counted(config).total


def test_counts_of_shared_experts_and_dense_layers(runtime: Runtime) -> None:
    config = load("--config", str(ROOT / "examples/tiny_moe.yaml"), "--no-gated-linear-unit", "--add-qkv-bias")
    assert built_parameters(config) == counted(config).total
    parameters = counted(config)
    unused = 3 * 6 * 2 * 64 * 64  # three layers, six of eight experts, two matrices of 64 x 64
    assert parameters.total - parameters.active == unused


@pytest.mark.parametrize("repeat", [1, 2, 5])
def test_counts_of_vectors_for_copies(repeat: int, runtime: Runtime) -> None:
    words = ["--preset", "tiny-phd", "--phd-repeat", str(repeat)]
    with_vectors, without = load(*words, "--phd-copy-embedding", "vector"), load(*words)
    assert built_parameters(with_vectors) == counted(with_vectors).total
    assert counted(with_vectors).total - counted(without).total == (repeat - 1) * 96


@pytest.mark.parametrize("name", WHOLE)
def test_budgets(name: str) -> None:
    preset, config = PRESETS[name], load("--preset", name)
    if preset.tokens:
        samples = config.training.train_samples
        assert samples is not None
        assert samples == math.ceil(preset.tokens / config.model.seq_length)
        assert config.optimizer.lr_warmup_tokens == pytest.approx(10.49e9 if "moe" in name else 8.39e9, rel=1e-3)
        assert config.training.global_batch_size == 1024
        assert config.data.split  # so that a validation loss exists
        assert config.training.eval_iters > 0


@pytest.mark.parametrize("name", WHOLE)
def test_decay_and_head_are_the_authors(name: str) -> None:
    """Their 1.2B-dense and MoE-1B-7B configurations; a head of its own starts at 1/sqrt(d_model)."""
    config, is_moe = load("--preset", name), "moe" in name
    if not PRESETS[name].tokens:
        assert (config.optimizer.decay_norms, config.optimizer.decay_embeddings) == (False, True)
        return
    assert (config.optimizer.decay_norms, config.optimizer.decay_embeddings) == (True, is_moe)
    untied = name in ("dense-7b", "moe-1b-7b")
    assert config.model.untie_embeddings_and_output_weights is untied
    width = {"dense-7b": 4096, "moe-1b-7b": 2048}.get(name)
    assert config.model.head_init_method_std == (None if width is None else pytest.approx(1 / math.sqrt(width)))


def test_names_of_phd_presets_are_their_policies() -> None:
    from phd_megatron.phd.kv_policy import KVPolicy

    for name, preset in PRESETS.items():
        if name.startswith("phd-") and not preset.is_whole:
            policy, _ = KVPolicy.from_options(*preset.values.values())
            assert name.upper() == policy.name.upper().removesuffix("-INF")


def test_presets_combine_and_everything_else_wins(tmp_path: Path) -> None:
    assert preset_values("phd-1.2b,phd-swa-5-16")["phd_chunk"] is None
    path = tmp_path / "run.yaml"
    path.write_text("model: {phd_repeat: 4}\ntraining: {train_iters: 7}\n")
    config = load(
        "--preset", "phd-1.2b,phd-swa-5-16", "--config", str(path), "--phd-window", "3", "--lr-warmup-iters", "1"
    )
    assert (config.model.phd_repeat, config.model.phd_window, config.model.phd_chunk) == (4, 3, None)
    assert (config.training.train_iters, config.training.train_samples) == (7, None)
    assert (config.optimizer.lr_warmup_iters, config.optimizer.lr_warmup_tokens) == (1, 0)


def test_a_saved_configuration_wins_over_the_preset() -> None:
    saved = {"model": {"num_layers": 9, "seq_length": 64}}
    loaded = load_run_config(["--preset", "tiny-dense", "--load", "d"], transformer_fields={}, saved=saved)
    assert (loaded.config.model.num_layers, loaded.config.model.hidden_size) == (9, 96)
    assert loaded.origins["hidden_size"] == "preset tiny-dense"
    assert loaded.origins["num_layers"] == "saved in d"


def test_plan_command(capsys: pytest.CaptureFixture[str]) -> None:
    from phd_megatron.cli.main import main

    assert main(["plan", "--preset", "moe-1b-7b", "--ranks", "8", "--mfu", "0.5", "--peak-tflops", "1000"]) == 0
    values = dict(re.findall(r"^(\S.*?) {2,}(\S.*)$", capsys.readouterr().out, re.MULTILINE))
    assert (values["parameters"], values["of these active for a token"]) == ("6.92B", "1.28B")
    flops, hours = (float(values[name].replace(",", "")) for name in ("training FLOPs", "device hours"))
    assert hours == pytest.approx(flops / 500e12 / 3600, rel=1e-3)
    assert main(["plan", "--preset", "moe-1b-7b", "--mfu", "2"]) == 2
    assert main(["plan", "--preset", "moe-1b-7b", "--ranks", "3"]) == 2


def test_unknown_preset_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"dense-1\.2b"):
        preset_values("dense-1.3b")


def test_written_examples_and_table_are_the_presets() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/write_presets.py"), "--check"], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", WHOLE)
def test_example_is_the_preset(name: str) -> None:
    from_file, from_table = load("--config", str(ROOT / f"examples/presets/{name}.yaml")), load("--preset", name)
    assert from_file == from_table
