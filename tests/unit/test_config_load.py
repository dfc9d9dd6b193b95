"""Loading a configuration: precedence, origins, and what is said about bad input."""

# ruff: noqa: UP007, UP035, UP045  (annotations written as Megatron-Core writes them)
from __future__ import annotations

import dataclasses
import enum
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Literal, Optional, Union

import pytest

from phd_megatron.config.catalog import ALTERNATIVES, fields, sections
from phd_megatron.config.load import LoadedConfig, load_run_config
from phd_megatron.config.serialize import from_dict, to_dict
from phd_megatron.config.values import decode
from phd_megatron.errors import UserError


class Backend(enum.Enum):
    auto = 1
    flash = 2


TRANSFORMER_FIELDS: dict[str, Any] = {
    "num_layers": int,
    "attention_backend": Backend,
    "recompute_granularity": Optional[Literal["full", "selective"]],
    "recompute_modules": Optional[list[str]],
    "recompute_num_layers": Optional[int],
    "moe_layer_freq": Union[int, list[int]],
    "window_size": Optional[tuple[int, int]],
    "bias_dropout_fusion": bool,
    "wgrad_deferral_limit": int,
    "activation_func": Callable,
    "layernorm_zero_centered_gamma": bool,
}


def load(*argv: str, saved: Any = None) -> LoadedConfig:
    return load_run_config(list(argv), transformer_fields=TRANSFORMER_FIELDS, saved=saved)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        load(*argv)
    return str(caught.value)


# ---------------------------------------------------------------- flags


def test_every_field_is_a_flag() -> None:
    for name, info in fields().items():
        text = {int: "3", float: "0.5", str: "word"}
        annotation = str(info.annotation)
        if "Literal" in annotation:
            words = [info.annotation.__args__[-1]]
        elif "bool" in annotation:
            words = ["true"]
        elif "list[int]" in annotation:
            words = ["3", "4"]
        elif "list[str]" in annotation:
            words = ["0.7", "P1", "0.3", "P2"]
        else:
            words = [next(word for kind, word in text.items() if kind.__name__ in annotation)]
        config = load(info.flag, *words).config
        value = getattr(getattr(config, info.section), name)
        assert value not in (None, []), name
        assert value == load("--" + name, *words).config.__dict__[info.section].__dict__[name]
        assert value != info.default or words in (["true"], [info.default]), name


@pytest.mark.parametrize(
    ("argv", "section", "name", "value"),
    [
        (["--num-layers", "4"], "model", "num_layers", 4),
        (["--num_layers", "4"], "model", "num_layers", 4),
        (["--num-layers=4"], "model", "num_layers", 4),
        (["--lr", "3e-4"], "optimizer", "lr", 3e-4),
        (["--lr", "1"], "optimizer", "lr", 1.0),
        (["--bf16"], "training", "bf16", True),
        (["--bf16", "true"], "training", "bf16", True),
        (["--bf16=True"], "training", "bf16", True),
        (["--bf16", "false"], "training", "bf16", False),
        (["--no-use-distributed-optimizer"], "parallel", "use_distributed_optimizer", False),
        (["--no_gated_linear_unit"], "model", "gated_linear_unit", False),
        (["--no-load-optim"], "checkpoint", "no_load_optim", True),
        (["--phd-chunk", "null"], "model", "phd_chunk", None),
        (["--phd-chunk", "none"], "model", "phd_chunk", None),
        (["--save", "null"], "checkpoint", "save", None),
        (["--save", "none"], "checkpoint", "save", "none"),
        (["--data-path", "0.7", "A", "0.3", "B", "--bf16"], "data", "data_path", ["0.7", "A", "0.3", "B"]),
        (["--data-path=A"], "data", "data_path", ["A"]),
        (["--rampup-batch-size", "8", "8", "1000"], "training", "rampup_batch_size", [8, 8, 1000]),
        (["--rampup-batch-size", "[8, 8, 1000]"], "training", "rampup_batch_size", [8, 8, 1000]),
        (["--seed", "-1"], "training", "seed", -1),
        (["--split", "949,50,1"], "data", "split", "949,50,1"),
    ],
)
def test_flag_forms(argv: list[str], section: str, name: str, value: object) -> None:
    got = getattr(getattr(load(*argv).config, section), name)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--num-layer", "4"], ["--num-layer", "did you mean --num-layers?"]),
        (["--tensor-parallel-size", "2"], ["did you mean --tensor-model-parallel-size?"]),
        (["--recompute-granulrity", "full"], ["did you mean --recompute-granularity?"]),
        (["--zzzz"], ["--zzzz", "--help"]),
        (["--transformer", "x"], ["unknown flag --transformer"]),
        (["--preset", "dense-1b"], ["preset 'dense-1b' is not known", "did you mean dense-1.2b?"]),
        (["--no-num-layers"], ["unknown flag"]),
        (["--no-bf16", "true"], ["'true'", "no flag"]),
        (["--no-bf16=true"], ["takes no value"]),
        (["--num-layers", "four"], ["num_layers='four'", "flag --num-layers", "an integer or null"]),
        (["--num-layers", "4.5"], ["num_layers='4.5'", "an integer"]),
        (["--bf16=1"], ["bf16='1'", "true or false"]),
        (["--bf16", "yes"], ["'yes'", "no flag"]),
        (["--lr", "nan"], ["lr='nan'", "a number"]),
        (["--lr", "inf"], ["lr='inf'", "a number"]),
        (["--lr", ""], ["lr=''", "a number"]),
        (["--lr"], ["--lr has no value"]),
        (["--lr", "--bf16"], ["--lr has no value"]),
        (["--data-path", "--bf16"], ["--data-path has no value"]),
        (["--lr-decay-style", "cosin"], ["lr_decay_style='cosin'", "constant, linear, cosine", "did you mean cosine?"]),
        (["--rampup-batch-size", "8", "x"], ["rampup_batch_size=['8', 'x']", "a list"]),
        (["--rampup-batch-size", "[8, "], ["not a list"]),
        (["-lr", "1"], ["'-lr'", "did you mean --lr?"]),
        (["stray"], ["'stray'"]),
        (["--"], ["'--'"]),
        (["--config"], ["--config has no value"]),
        (["--config", "a.yaml", "--config", "b.yaml"], ["a.yaml", "b.yaml", "one YAML file"]),
        (["--config", "no/such.yaml"], ["no/such.yaml", "No such file"]),
    ],
)
def test_bad_flags_are_refused_with_the_cure(argv: list[str], words: list[str]) -> None:
    message = refusal(*argv)
    for word in words:
        assert word in message


def test_the_last_of_two_equal_flags_counts_and_is_told() -> None:
    loaded = load("--lr", "1", "--lr", "2")
    assert loaded.config.optimizer.lr == 2
    assert any("--lr was given twice" in note for note in loaded.notes)


# ---------------------------------------------------------------- TransformerConfig fields


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--recompute-granularity", "full"], "recompute_granularity", "full"),
        (["--recompute-modules", "core_attn", "mlp"], "recompute_modules", ["core_attn", "mlp"]),
        (["--recompute-num-layers", "2"], "recompute_num_layers", 2),
        (["--moe-layer-freq", "2"], "moe_layer_freq", 2),
        (["--moe-layer-freq", "1", "0"], "moe_layer_freq", [1, 0]),
        (["--moe-layer-freq", "[1,0]"], "moe_layer_freq", [1, 0]),
        (["--bias-dropout-fusion"], "bias_dropout_fusion", True),
        (["--no-bias-dropout-fusion"], "bias_dropout_fusion", False),
        (["--attention-backend", "flash"], "attention_backend", "flash"),
    ],
)
def test_transformer_fields_pass_through(argv: list[str], name: str, value: object, tmp_path: Path) -> None:
    loaded = load(*argv)
    assert loaded.config.model.transformer == {name: value}
    assert loaded.origins[name].startswith("flag --")
    path = write(
        tmp_path / "run.yaml", f"model:\n  {name}: {str(value).lower() if value in (True, False) else value}\n"
    )
    assert load("--config", path).config.model.transformer == {name: value}


def test_own_fields_win_over_transformer_fields_of_the_same_name() -> None:
    config = load("--num-layers", "4").config
    assert config.model.num_layers == 4
    assert config.model.transformer == {}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--attention-backend", "flsh"], ["attention_backend='flsh'", "auto, flash", "did you mean flash?"]),
        (["--recompute-num-layers", "x"], ["recompute_num_layers='x'", "an integer or null"]),
        (["--activation-func", "gelu"], ["activation_func='gelu'", "Python object"]),
        (["--window-size", "1", "2", "3"], ["window_size=['1', '2', '3']"]),
    ],
)
def test_transformer_fields_are_checked(argv: list[str], words: list[str]) -> None:
    message = refusal(*argv)
    for word in words:
        assert word in message


def test_decode_gives_enum_members_and_tuples_back() -> None:
    values = {"attention_backend": "flash", "window_size": [3, 4], "bias_dropout_fusion": True, "unknown": "x"}
    assert decode(values, TRANSFORMER_FIELDS) == {
        "attention_backend": Backend.flash,
        "window_size": (3, 4),
        "bias_dropout_fusion": True,
        "unknown": "x",
    }


# ---------------------------------------------------------------- YAML


def test_yaml_sections(tmp_path: Path) -> None:
    path = write(
        tmp_path / "run.yaml",
        "model:\n  num_layers: 4\n  recompute_granularity: full\n  transformer:\n    moe_layer_freq: [1, 0]\n"
        "data:\n  data_path: [0.7, A, 0.3, B]\noptimizer:\n  lr: 3e-4\n  clip_grad: 1\nparallel:\n",
    )
    config = load("--config", path).config
    assert config.model.num_layers == 4
    assert config.model.transformer == {"recompute_granularity": "full", "moe_layer_freq": [1, 0]}
    assert config.data.data_path == ["0.7", "A", "0.3", "B"]
    assert config.optimizer.lr == 3e-4  # YAML 1.1 reads 3e-4 as text
    assert config.optimizer.clip_grad == 1.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modell:\n  num_layers: 4\n", ["unknown section 'modell'", "did you mean model?"]),
        ("num_layers: 4\n", ["unknown section 'num_layers'", "`model:`"]),
        ("model:\n  num_layer: 4\n", ["unknown field 'num_layer'", "section 'model'", "did you mean num_layers?"]),
        ("model:\n  lr: 4\n", ["unknown field 'lr'", "belongs in section 'optimizer'"]),
        ("training:\n  recompute_granularity: full\n", ["unknown field 'recompute_granularity'"]),
        ("model:\n  swiglu: true\n", ["in YAML write `gated_linear_unit: true`"]),
        ("model:\n  norm_epsilon: 1\n", ["in YAML write layernorm_epsilon"]),
        ("model:\n  recompute_granulrity: full\n", ["did you mean recompute_granularity?"]),
        ("model:\n  transformer:\n    num_layers: 4\n", ["num_layers", "section model"]),
        ("model:\n  transformer:\n    no_such: 4\n", ["unknown TransformerConfig field 'no_such'"]),
        ("model:\n  transformer: 4\n", ["model.transformer holds 4"]),
        ("model: 4\n", ["section 'model' holds 4"]),
        ("- model\n", ["list", "sections"]),
        ("model:\n  num_layers: true\n", ["num_layers=True", "an integer"]),
        ("model:\n  num_layers: 4.5\n", ["num_layers=4.5", "an integer"]),
        ("training:\n  bf16: 1\n", ["bf16=1", "true or false"]),
        ("optimizer:\n  lr: true\n", ["lr=True", "a number"]),
        ("optimizer:\n  lr: .inf\n", ["lr=inf", "a number"]),
        ("logging:\n  wandb_exp_name: 3\n", ["wandb_exp_name=3", "text or null", "quotes"]),
        ("data:\n  data_path: [true]\n", ["data_path=[True]"]),
        ("data:\n  data_path: corpus\n", ["data_path='corpus'", "a list"]),
        ("training:\n  seed: null\n", ["seed=None", "an integer"]),
        ("model:\n  num_layers: 4\n  num_layers: 5\n", ["'num_layers'", "line 2", "line 3"]),
        ("model:\n  num_layers: 4\nmodel:\n  hidden_size: 5\n", ["'model'", "line 1", "line 3"]),
        ("model: [\n", ["line 2", "not YAML"]),
        ("model: !!python/object/apply:os.system [ls]\n", ["not YAML"]),
    ],
)
def test_bad_yaml_is_refused_with_file_and_cure(text: str, words: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", text)
    message = refusal("--config", path)
    assert path in message
    for word in words:
        assert word in message


def test_yaml_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"model:\n  norm_scheme: \xff\n")
    assert "not UTF-8" in refusal("--config", str(path))


def test_yaml_anchors_and_merges_are_no_duplicates(tmp_path: Path) -> None:
    text = "training: &t\n  seed: 3\nmodel:\n  num_layers: &n 4\n  hidden_size: *n\n"
    assert load("--config", write(tmp_path / "run.yaml", text)).config.model.hidden_size == 4


# ---------------------------------------------------------------- precedence


def test_precedence_and_origins(tmp_path: Path) -> None:
    saved = to_dict(from_dict({"training": {"seed": 1, "eval_iters": 1}, "optimizer": {"lr": 1.0}}))
    path = write(tmp_path / "run.yaml", "training:\n  seed: 2\n  eval_iters: 2\n")
    loaded = load("--config", path, "--seed", "3", "--load", "ckpt", saved=saved)
    config, origins = loaded.config, loaded.origins
    assert (config.training.seed, config.training.eval_iters, config.optimizer.lr) == (3, 2, 1.0)
    assert origins["seed"] == "flag --seed"
    assert origins["eval_iters"] == path
    assert origins["lr"] == "saved in ckpt"
    assert load("--seed", "3").origins["lr"] == "default"


def test_a_value_equal_to_the_default_still_wins(tmp_path: Path) -> None:
    saved = to_dict(from_dict({"training": {"seed": 1}}))
    assert load("--load", "ckpt", "--seed", "1234", saved=saved).config.training.seed == 1234


def test_saved_may_be_a_function_of_the_load_directory(tmp_path: Path) -> None:
    asked = []

    def read(directory: str) -> dict[str, Any] | None:
        asked.append(directory)
        return to_dict(from_dict({"training": {"seed": 7}})) if directory == "full" else None

    path = write(tmp_path / "run.yaml", "checkpoint:\n  load: full\n")
    assert load("--config", path, saved=read).config.training.seed == 7
    assert load("--config", path, "--load", "empty", saved=read).config.training.seed == 1234
    assert load(saved=read).config.training.seed == 1234
    assert asked == ["full", "empty"]


def test_fields_of_one_start_are_not_inherited() -> None:
    data: dict[str, Any] = {
        "checkpoint": {"load": "old", "finetune": True, "save": "out"},
        "training": {"exit_interval": 5, "seed": 9},
        "logging": {"dump_gradients_dir": "g"},
    }
    config = load("--load", "ckpt", saved=to_dict(from_dict(data))).config
    assert config.checkpoint.load == "ckpt"
    assert config.checkpoint.save is None
    assert config.training.seed == 9
    assert (config.checkpoint.finetune, config.training.exit_interval) == (False, None)
    assert config.logging.dump_gradients_dir is None


def test_saved_transformer_fields_are_taken_over() -> None:
    saved = to_dict(from_dict({"model": {"transformer": {"recompute_granularity": "full"}}}))
    config = load("--load", "ckpt", "--recompute-granularity", "selective", saved=saved).config
    assert config.model.transformer == {"recompute_granularity": "selective"}


def test_an_alternative_replaces_a_weaker_one(tmp_path: Path) -> None:
    saved = to_dict(from_dict({"training": {"train_iters": 100, "bf16": True}}))
    loaded = load("--load", "ckpt", "--train-samples", "5", "--fp16", saved=saved)
    assert (loaded.config.training.train_iters, loaded.config.training.train_samples) == (None, 5)
    assert (loaded.config.training.bf16, loaded.config.training.fp16) == (False, True)
    assert any("train_iters=100 (saved in ckpt) is replaced by train_samples=5" in note for note in loaded.notes)
    spread = load("--load", "ckpt", "--evals-per-run", "4", saved={"training": {"eval_interval": 1000}})
    assert (spread.config.training.eval_interval, spread.config.training.evals_per_run) == (None, 4)
    apart = load("--load", "ckpt", "--eval-interval", "1000", saved={"training": {"evals_per_run": 4}})
    assert (apart.config.training.eval_interval, apart.config.training.evals_per_run) == (1000, None)
    kept = load("--load", "ckpt", "--no-fp16", saved=saved).config
    assert kept.training.bf16 is True
    for group in ALTERNATIVES:
        assert fields().keys() >= set(group)


def test_how_a_pipeline_is_cut_is_inherited_with_its_size_only() -> None:
    cut = {"virtual_pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 2}
    saved = to_dict(from_dict({"parallel": {"pipeline_model_parallel_size": 2, **cut, "overlap_grad_reduce": True}}))
    same = load("--load", "ckpt", "--pipeline-model-parallel-size", "2", saved=saved).config.parallel
    other = load("--load", "ckpt", "--pipeline-model-parallel-size", "4", saved=saved).config.parallel
    assert load("--load", "ckpt", saved=saved).config.parallel == same
    assert (same.virtual_pipeline_model_parallel_size, same.num_layers_in_first_pipeline_stage) == (2, 2)
    assert (other.virtual_pipeline_model_parallel_size, other.num_layers_in_first_pipeline_stage) == (None, None)
    assert other.overlap_grad_reduce
    replaced = load("--load", "ckpt", "--num-layers-per-virtual-pipeline-stage", "1", saved=saved)
    assert replaced.config.parallel.virtual_pipeline_model_parallel_size is None
    assert any("is replaced by num_layers_per_virtual_pipeline_stage=1" in note for note in replaced.notes)


def test_a_saved_configuration_of_another_release_is_named() -> None:
    with pytest.raises(UserError, match=r"saved in ckpt.*no_such"):
        load("--load", "ckpt", saved={"model": {"no_such": 1}})


# ---------------------------------------------------------------- the schema itself, help, cost


def test_field_names_are_unique_and_have_help() -> None:
    names = [field.name for cls in sections().values() for field in dataclasses.fields(cls)]
    assert sorted(names) == sorted([*fields(), "transformer"])
    assert len(names) == len(set(names))
    assert [name for name, info in fields().items() if not info.help] == []


def test_help_lists_every_field_and_exits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load("--num-layers", "4", "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for info in fields().values():
        assert f"  {info.flag}\n" in text
        assert info.help in text
    assert "--lr\n      peak learning rate (a number, default 0.0003)" in text
    assert "--recompute-granularity" in text
    assert "--layernorm-zero-centered-gamma" not in text
    assert "--apply-layernorm-1p: refused" in text
    for section in sections():
        assert f"\n{section}: " in text


def test_loading_imports_nothing_heavy() -> None:
    code = (
        "import sys; from phd_megatron.config.load import load_run_config; "
        "load_run_config(['--num-layers', '2', '--lr', '1'], transformer_fields={}); "
        "import phd_megatron.config.resolve, phd_megatron.config.resume, phd_megatron.config.help; "
        "print([m for m in ('torch', 'megatron', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
