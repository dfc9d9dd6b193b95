"""Resolving, validating, refusing, writing and comparing configurations."""

from __future__ import annotations

import copy
import math
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from phd_megatron.config.catalog import fields
from phd_megatron.config.help import format_config
from phd_megatron.config.load import load_run_config
from phd_megatron.config.resolve import resolve, warnings
from phd_megatron.config.resume import check_resume
from phd_megatron.config.schema import CopyPositions, RunConfig
from phd_megatron.config.serialize import dump_yaml, from_dict, load_yaml, lookup, to_dict
from phd_megatron.config.validate import require_for_pretraining
from phd_megatron.errors import UserError
from phd_megatron.norm.schemes import NORM_SCHEMES

from .configurations import make, refusal, resolved

# ---------------------------------------------------------------- derived values


def test_defaults_are_derived_and_told() -> None:
    config = make(norm_scheme="hybrid_star", seq_length=96)
    notes = resolve(config)
    model = config.model
    assert (model.ffn_hidden_size, model.num_query_groups, model.kv_channels) == (256, 4, 16)
    assert model.max_position_embeddings == 96
    assert model.init_method_std == pytest.approx(1 / math.sqrt(2.5 * 64))
    assert model.init == "megatron"
    assert config.training.global_batch_size is None
    assert model.vocab_size is None
    for word in ("ffn_hidden_size=256", "init_method_std=", "init=megatron"):
        assert any(word in note for note in notes)
    assert resolved(norm_scheme="pre").model.init == "normal"


def test_a_scheme_that_a_shallow_model_turns_into_pre_is_told() -> None:
    def told(scheme: str, layers: int) -> bool:
        return any(
            "every block is that of pre" in note for note in resolve(make(norm_scheme=scheme, num_layers=layers))
        )

    assert {(name, layers) for name in NORM_SCHEMES for layers in (1, 3, 4) if told(name, layers)} == {
        ("mix_ln", 1),
        ("mix_ln", 3),
    }


def test_validations_are_spread_by_steps_or_over_the_run() -> None:
    assert (resolved().training.eval_interval, resolved().training.evals_per_run) == (1000, None)
    assert resolved(eval_interval=7).training.eval_interval == 7
    spread = resolved(evals_per_run=4).training
    assert (spread.eval_interval, spread.evals_per_run) == (None, 4)
    for interval in (7, 1000):
        assert "exclude each other" in refusal(evals_per_run=4, eval_interval=interval)
    assert "evals_per_run=0 is out of range" in refusal(evals_per_run=0)


def test_a_head_of_its_own_may_start_otherwise() -> None:
    assert (
        resolved(head_init_method_std=0.5, untie_embeddings_and_output_weights=True).model.head_init_method_std == 0.5
    )
    message = refusal(head_init_method_std=0.5)
    assert "head_init_method_std=0.5 without a head of its own" in message and "set untie_embeddings" in message
    assert "is out of range" in refusal(head_init_method_std=0.0, untie_embeddings_and_output_weights=True)
    untied = {"untie_embeddings_and_output_weights": True}
    (note,) = check_resume(resolved(**untied), resolved(**untied, head_init_method_std=0.5))
    assert "head_init_method_std: None -> 0.5" in note


def test_given_values_are_kept() -> None:
    given = {
        **{"ffn_hidden_size": 100, "num_query_groups": 2, "kv_channels": 32, "max_position_embeddings": 4096},
        **{"init_method_std": 0.02, "init": "depth_scaled", "norm_scheme": "hybrid"},
    }
    config = resolved(**given)
    assert {name: lookup(config, name) for name in given} == given


@pytest.mark.parametrize(
    ("given", "wanted", "note"),
    [
        ((1, None, None), (None, None), None),
        ((1, 4, 8), (4, 8), "no effect"),
        ((2, None, None), (16, 32), "PHD-CSWA-2-16-32"),
        ((3, None, 64), (16, 64), "PHD-CSWA-3-16-64"),
        ((2, 16, None), (16, None), None),
        ((2, 1, None), (1, None), None),
        ((2, 1, 8), (1, 8), None),
        ((2, 64, 32), (64, 32), None),
    ],
)
def test_window_and_chunk(given: tuple[Any, Any, Any], wanted: tuple[Any, Any], note: str | None) -> None:
    config = make(**dict(zip(("phd_repeat", "phd_window", "phd_chunk"), given, strict=True)))
    notes = [line for line in resolve(config) if "phd_" in line]
    assert (config.model.phd_window, config.model.phd_chunk) == wanted
    assert bool(notes) == (note is not None)
    assert note is None or note in notes[0]


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ({"phd_repeat": 2, "phd_copy_positions": "fraction", "phd_copy_embedding": "vector"}, None),
        (
            {"phd_copy_positions": "repeated", "phd_copy_embedding": "vector"},
            "phd_copy_positions=repeated, phd_copy_embedding=vector: no effect at phd_repeat=1",
        ),
        (
            {"phd_repeat": 3, "phd_copy_positions": "repeated", "seq_length": 100, "rotary_base": 5e5},
            "tokens are 3 RoPE positions apart, which go up to 299 for 100 tokens; rotary_base=500000",
        ),
    ],
    ids=str,
)
def test_copies_told_apart_are_explained(values: dict[str, Any], note: str | None) -> None:
    found = [line for line in warnings(make(**values)) if "phd_copy" in line]
    assert len(found) == (note is not None) and (note is None or note in found[0])


def test_the_option_has_the_kinds_that_there_are() -> None:
    from phd_megatron.phd.copy_positions import COPY_POSITIONS

    assert typing.get_args(CopyPositions) == COPY_POSITIONS


@pytest.mark.parametrize("kind", ["repeated", "fraction"])
def test_positions_that_float32_does_not_tell_apart_are_refused(kind: str) -> None:
    exact = {"phd_repeat": 2, "phd_copy_positions": kind, "seq_length": 64, "max_position_embeddings": 2**23}
    resolve(make(**exact))
    with pytest.raises(UserError, match=f"phd_copy_positions='{kind}': 16777218 places"):
        resolve(make(**{**exact, "max_position_embeddings": 2**23 + 1}))
    resolve(make(**{**exact, "phd_copy_positions": "token", "max_position_embeddings": 2**23 + 1}))


@pytest.mark.parametrize("values", [{}, {"phd_repeat": 2}, {"phd_repeat": 3, "phd_window": 4, "norm_scheme": "hybrid"}])
def test_resolve_is_idempotent(values: dict[str, Any]) -> None:
    config = make(**values)
    resolve(config)
    before = copy.deepcopy(config)
    assert resolve(config) == []
    assert config == before


# ---------------------------------------------------------------- validation


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_layers": None}, ["num_layers is not set", "--num-layers"]),
        ({"num_layers": 0}, ["num_layers=0", "at least 1"]),
        ({"seq_length": -1}, ["seq_length=-1", "at least 1"]),
        ({"lr": 0.0}, ["lr=0.0", "above 0"]),
        ({"lr": 1e-4, "min_lr": 1e-3}, ["min_lr=0.001", "lr=0.0001"]),
        ({"clip_grad": -1.0}, ["clip_grad=-1.0", "at least 0"]),
        ({"hidden_dropout": 1.0}, ["hidden_dropout=1.0", "at most 0.99"]),
        ({"rotary_percent": 0.0}, ["rotary_percent=0.0"]),
        ({"lr_warmup_fraction": 1.5}, ["lr_warmup_fraction=1.5"]),
        ({"phd_repeat": 0}, ["phd_repeat=0", "at least 1"]),
        ({"phd_repeat": 2, "phd_window": 0}, ["phd_window=0"]),
        ({"phd_repeat": 2, "phd_window": 4, "phd_chunk": 0}, ["phd_chunk=0", "null"]),
        ({"num_query_groups": 3}, ["num_attention_heads=4", "num_query_groups=3", "1, 2, 4"]),
        ({"hidden_size": 66}, ["hidden_size=66", "num_attention_heads=4", "hidden_size=68"]),
        ({"kv_channels": 15}, ["kv_channels=15", "even"]),
        ({"hidden_size": 60}, ["kv_channels=15", "even"]),
        ({"max_position_embeddings": 8}, ["max_position_embeddings=8", "seq_length=1024"]),
        ({"norm_scheme": "hybird"}, ["norm_scheme='hybird'", "hybrid_star", "did you mean hybrid?"]),
        ({"train_iters": 5, "train_samples": 5}, ["train_iters=5 and train_samples=5", "give one"]),
        ({"lr_warmup_iters": 5, "lr_warmup_tokens": 5}, ["lr_warmup_iters=5 and lr_warmup_tokens=5"]),
        ({"lr_warmup_samples": 5, "lr_warmup_fraction": 0.1}, ["lr_warmup_samples=5 and lr_warmup_fraction=0.1"]),
        ({"lr_decay_iters": 5, "lr_decay_samples": 5}, ["lr_decay_iters=5"]),
        ({"bf16": True, "fp16": True}, ["bf16=True and fp16=True"]),
        ({"data_path": ["A"], "train_data_path": ["B"]}, ["data_path=['A']", "train_data_path=['B']"]),
        ({"data_path": ["A", "B"]}, ["data_path has 2 words", "'A'", "W1 P1"]),
        ({"data_path": ["0.5", "A", "-1", "B"]}, ["'-1'", "no weight above 0"]),
        ({"split": "a,b"}, ["split='a,b'", "969,30,1"]),
        ({"split": "0,0,0"}, ["split='0,0,0'"]),
        ({"split": "1,2,3,4"}, ["split='1,2,3,4'"]),
        ({"rampup_batch_size": [8, 8]}, ["rampup_batch_size=[8, 8]", "three numbers"]),
        ({"rampup_batch_size": [8, 8, 100], "train_iters": 5}, ["train_iters=5", "train_samples"]),
        ({"global_batch_size": 5, "micro_batch_size": 2}, ["global_batch_size=5", "micro_batch_size=2"]),
        ({"overlap_param_gather": True}, ["overlap_param_gather=True", "overlap_grad_reduce"]),
        ({"lr_decay_style": "WSD"}, ["lr_decay_style='WSD'", "lr_wsd_decay_iters"]),
        ({"save_interval": 5}, ["save_interval=5", "set save"]),
        ({"finetune": True}, ["finetune=True", "set load"]),
        ({"exit_on_missing_checkpoint": True}, ["exit_on_missing_checkpoint=True", "set load"]),
        ({"save": "out", "async_save": True}, ["async_save=True", "set save_interval"]),
        ({"dump_gradients_iterations": [0]}, ["dump_gradients_iterations", "at least 1"]),
        ({"save": "out", "keep_last": 0}, ["keep_last=0", "at least 1", "or null"]),
        ({"lr": 1e-4, "min_lr": 1.0001e-4}, ["min_lr=0.00010001"]),
        ({"kv_channels": 6, "rotary_percent": 0.5}, ["rotary_percent=0.5", "kv_channels=6 is 3"]),
        ({"head_init_method_std": 0.1}, ["head_init_method_std=0.1", "untie_embeddings_and_output_weights"]),
        ({"split": "1,-1"}, ["split='1,-1'"]),
        ({"split": ""}, ["split=''"]),
        ({"data_path": ["0", "B"]}, ["'0'", "no weight above 0"]),
        ({"valid_data_path": ["A", "B"]}, ["valid_data_path has 2 words"]),
        ({"train_data_path": ["A", "B"]}, ["train_data_path has 2 words"]),
        ({"test_data_path": ["A", "B"]}, ["test_data_path has 2 words"]),
        ({"rampup_batch_size": [8, 8, 100], "lr_warmup_iters": 5}, ["lr_warmup_iters=5", "use lr_warmup_samples"]),
        ({"rampup_batch_size": [8, 8, 100], "lr_decay_iters": 5}, ["lr_decay_iters=5", "use lr_decay_samples"]),
        (
            {"overlap_param_gather": True, "overlap_grad_reduce": True, "use_distributed_optimizer": False},
            ["overlap_p"],
        ),
        ({"eval_interval": 5, "evals_per_run": 5}, ["eval_interval=5 and evals_per_run=5"]),
        ({"lr_wsd_decay_iters": 5, "lr_wsd_decay_samples": 5}, ["lr_wsd_decay_iters=5 and lr_wsd_decay_samples=5"]),
        # profile: the steps after the first, up to and including the second, which lie inside the run
        ({"profile": True, "save": "out", "profile_step_start": 12}, ["profile_step_end=12 is not after", "use 13"]),
        ({"profile": True, "save": "out", "profile_step_start": 13}, ["profile_step_end=12 is not after", "use 14"]),
        ({"profile": True, "save": "out", "train_iters": 11}, ["profile_step_end=12 is beyond train_iters=11"]),
        ({"profile": True, "save": "out", "profile_ranks": []}, ["profile_ranks=[] are not ranks"]),
        ({"profile": True}, ["profile=True without a place", "profile_dir"]),
    ],
)
def test_bad_values(values: dict[str, Any], words: list[str]) -> None:
    message = refusal(**values)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "values",
    [
        {"train_iters": 5, "lr_warmup_tokens": 100, "lr_decay_style": "WSD", "lr_wsd_decay_iters": 2},
        {"data_path": ["0.7", "A", "0.3", "B"]},
        {"data_path": ["A", "B", "C"]},
        {"rampup_batch_size": [8, 8, 100], "train_samples": 500},
        {"overlap_param_gather": True, "overlap_grad_reduce": True},
        {"normalization": "LayerNorm", "gated_linear_unit": False, "add_bias_linear": True},
        {"kv_channels": 32, "num_query_groups": 1},
        {"rotary_percent": 0.5},
        {"split": "100"},
        {"split": "0,0,1"},
        {"save": "out", "keep_last": 1},
        {"lr": 1e-4, "min_lr": 1e-4},
        {"kv_channels": 6, "rotary_percent": 0.7},  # 4.2 of 6: RoPE turns 4
        {"max_position_embeddings": 1024},
        {"head_init_method_std": 0.1, "untie_embeddings_and_output_weights": True},
        {"lr_decay_style": "WSD", "lr_wsd_decay_samples": 2},
        {"profile": True, "save": "out", "train_iters": 12},
        {"profile": True, "profile_dir": "p", "profile_step_start": 11},
        {"profile_step_start": 12, "profile_ranks": []},  # nothing is traced, so nothing is asked of them
    ],
)
def test_good_values_are_taken_as_they_are(values: dict[str, Any]) -> None:
    run = resolved(**values)
    assert {name: lookup(run, name) for name in values} == values


def test_all_problems_are_told_at_once() -> None:
    message = refusal(seq_length=0, micro_batch_size=0, clip_grad=-1.0)
    assert message.startswith("3 problems:")
    for word in ("seq_length=0", "micro_batch_size=0", "clip_grad=-1.0"):
        assert word in message


def test_what_pretraining_needs() -> None:
    with pytest.raises(UserError, match=r"(?s)train_iters.*data_path"):
        require_for_pretraining(resolved())
    require_for_pretraining(resolved(train_samples=5, train_data_path=["A"]))


def test_layers_of_a_virtual_stage_become_the_number_of_stages() -> None:
    config = make(num_layers=8, pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=2)
    assert any("virtual_pipeline_model_parallel_size=2" in note for note in resolve(config))
    assert config.parallel.virtual_pipeline_model_parallel_size == 2
    before = copy.deepcopy(config)
    resolve(config)
    assert config == before, "a second call changes nothing"
    with pytest.raises(UserError, match="num_layers_per_virtual_pipeline_stage=3: num_layers=8 is not a multiple of"):
        resolve(make(num_layers=8, pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=3))


# ---------------------------------------------------------------- as data and YAML


def test_round_trip(tmp_path: Path) -> None:
    config = resolved(
        phd_repeat=2, data_path=["0.7", "größe"], lr=3e-5, recompute_granularity="selective", recompute_modules=["mlp"]
    )
    assert from_dict(to_dict(config)) == config
    dump_yaml(config, tmp_path / "run.yaml")
    assert load_yaml(tmp_path / "run.yaml") == config
    assert yaml.safe_load((tmp_path / "run.yaml").read_text(encoding="utf-8")) == to_dict(config)


def test_to_dict_shares_nothing_with_the_configuration() -> None:
    config = make(recompute_granularity="full")
    data = to_dict(config)
    data["model"]["transformer"]["x"] = 1
    data["logging"]["dump_gradients_iterations"].append(9)
    assert config.model.transformer == {"recompute_granularity": "full"}
    assert RunConfig().logging.dump_gradients_iterations == [1]


@pytest.mark.parametrize("data", [{"modle": {}}, {"model": {"x": 1}}, {"model": {"num_layers": "x"}}, {"model": 3}])
def test_from_dict_is_strict(data: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        from_dict(data)


def test_printed_form_shows_every_field_and_its_origin() -> None:
    config = resolved(phd_repeat=2, recompute_granularity="full")
    text = format_config(config, {"num_layers": "flag --num-layers", "recompute_granularity": "run.yaml"})
    for name in fields():
        assert f"\n  {name}: " in text
    assert "  num_layers: 2  # flag --num-layers\n" in text
    assert "  recompute_granularity: full  # run.yaml\n" in text
    assert "  phd_window: 16  # derived\n" in text
    assert "  seq_length: 1024\n" in text


EXAMPLES = sorted(
    path for folder in ("examples", "examples/presets") for path in (Path(__file__).parents[2] / folder).glob("*.yaml")
)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_are_valid(path: Path) -> None:
    from phd_megatron.model.transformer_config import transformer_field_types

    argv = ["--config", str(path), "--save", "x"]
    run = load_run_config(argv, transformer_fields=transformer_field_types()).config
    resolve(run)
    sections = yaml.safe_load(path.read_text())
    written = {name: value for section in sections.values() for name, value in section.items() if name != "transformer"}
    extra = sections["model"].get("transformer") or {}
    assert len(written) > 5
    assert {name: lookup(run, name) for name in written} == written
    assert {name: run.model.transformer[name] for name in extra} == extra


def test_the_examples_are_found() -> None:
    assert {"quickstart_phd", "phd-1.2b"} <= {path.name.removesuffix(".yaml") for path in EXAMPLES}


# ---------------------------------------------------------------- resume


def test_resume_with_the_same_configuration_says_nothing() -> None:
    assert check_resume(resolved(), resolved()) == []
    assert check_resume(resolved(exit_interval=3), resolved(load="x", finetune=False)) == []


def test_finetuning_may_change_what_has_no_parameters() -> None:
    new = {"load": "ckpt", "finetune": True}
    notes = check_resume(resolved(), resolved(**new, seq_length=512, phd_repeat=2))
    assert {note.split(": ")[1] for note in notes} == {
        *("seq_length", "max_position_embeddings", "phd_repeat", "phd_window", "phd_chunk")
    }
    with pytest.raises(UserError, match="hidden_size"):
        check_resume(resolved(), resolved(**new, hidden_size=128))


@pytest.mark.parametrize("finetune", [True, False])
@pytest.mark.parametrize("repeat", [1, 3])
def test_vectors_bind_the_number_of_copies(finetune: bool, repeat: int) -> None:
    vectors = {"phd_copy_embedding": "vector", "phd_window": 4}
    saved, new = resolved(phd_repeat=2, **vectors), {"load": "ckpt", "finetune": finetune}
    with pytest.raises(
        UserError, match=f"phd_repeat={repeat}: .* a learned vector for each of its phd_repeat=2"
    ) as said:
        check_resume(saved, resolved(phd_repeat=repeat, **vectors, **new))
    assert "--finetune" not in str(said.value)
    assert check_resume(saved, resolved(phd_repeat=2, **vectors, **new)) == []


@pytest.mark.parametrize("finetune", [True, False])
def test_finetuning_may_add_vectors_and_move_copies(finetune: bool) -> None:
    apart = {"phd_copy_embedding": "vector", "phd_copy_positions": "fraction"}
    saved, new = resolved(phd_repeat=2), resolved(phd_repeat=2, **apart, load="ckpt", finetune=finetune)
    if finetune:
        assert {note.split(": ")[1] for note in check_resume(saved, new)} == apart.keys()
        with pytest.raises(UserError, match="phd_copy_embedding='none'"):
            check_resume(new, resolved(phd_repeat=2, load="ckpt", finetune=True))
    else:
        with pytest.raises(UserError, match="add --finetune"):
            check_resume(saved, new)


def test_a_vocabulary_still_to_be_read_is_no_difference() -> None:
    assert check_resume(resolved(vocab_size=256), resolved()) == []
