"""The record of what a model is: sizes that follow from others, and one place that makes it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from phd_megatron.config.architecture import Architecture, architecture_of, head_dim, is_resolved, kv_policy
from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import ModelConfig, RunConfig
from phd_megatron.errors import UserError
from phd_megatron.huggingface.architecture import Architecture as Exported
from phd_megatron.phd.kv_policy import KVPolicy

ROOT = Path(__file__).resolve().parents[2]


def small(**values: object) -> ModelConfig:
    return ModelConfig(**{"num_layers": 3, "hidden_size": 40, "num_attention_heads": 4, "seq_length": 24} | values)  # type: ignore[arg-type]


def test_sizes_follow_from_others() -> None:
    record = architecture_of(small())
    assert (record.ffn_hidden_size, record.groups, record.head_dim, record.max_position_embeddings) == (160, 4, 10, 24)
    assert record.init_std == 0.1  # 1 / sqrt(2.5 * 40)
    assert record.policy == KVPolicy(1) and record.moe is None and len(record.blocks) == 3


def test_what_is_given_is_taken() -> None:
    given = {"ffn_hidden_size": 7, "num_query_groups": 2, "kv_channels": 6, "max_position_embeddings": 99}
    record = architecture_of(
        small(**given, init_method_std=0.5, phd_repeat=3, phd_window=4, phd_copy_embedding="vector")
    )
    assert (record.ffn_hidden_size, record.groups, record.head_dim, record.max_position_embeddings) == (7, 2, 6, 99)
    assert record.init_std == 0.5 and record.policy == KVPolicy(3, 4) and record.copy_embedding == "vector"
    experts = architecture_of(small(transformer={"num_moe_experts": 4, "moe_layer_freq": 2})).moe
    assert experts is not None and experts.layers == (True, False, True) and experts.ffn_hidden_size == 160


@pytest.mark.parametrize(
    "values", [{}, {"phd_repeat": 2}, {"phd_repeat": 2, "phd_window": 1}, {"add_bias_linear": True}]
)
def test_a_model_and_the_resolved_one_have_one_record(values: dict[str, object]) -> None:
    run = RunConfig(model=small(**values))
    before = architecture_of(run.model)
    assert not is_resolved(run.model), "nothing was written down"
    resolve(run)
    assert is_resolved(run.model) and architecture_of(run.model) == before
    assert head_dim(run.model) == before.head_dim and kv_policy(run.model) == before.policy
    exported = Exported.from_model(run.model, 257)
    fields = {field.name: getattr(exported, field.name) for field in dataclasses.fields(Architecture)}
    assert Architecture(**fields) == before and exported.vocab_size == 257


def test_the_record_is_of_the_configuration_as_it_is_now() -> None:
    model = small(phd_repeat=2)
    assert architecture_of(model).policy == KVPolicy(2, 16, 32)
    model.phd_repeat, model.hidden_size = 3, 80
    assert (architecture_of(model).policy.repeat, architecture_of(model).head_dim) == (3, 20)


def test_a_head_is_unknown_while_the_model_does_not_say_enough() -> None:
    assert head_dim(ModelConfig()) is None and head_dim(ModelConfig(hidden_size=64)) is None
    assert head_dim(ModelConfig(kv_channels=8)) == 8


def test_numbers_of_copies_are_refused_in_words() -> None:
    with pytest.raises(UserError, match="phd_window=0: it counts tokens"):
        kv_policy(small(phd_repeat=2, phd_window=0))


def test_the_policy_is_made_in_one_place() -> None:
    texts = {path: path.read_text("utf-8") for path in (ROOT / "phd_megatron").rglob("*.py")}
    made = [path.name for path, text in texts.items() if re.search(r"KVPolicy\.from_options\(", text)]
    assert made == ["architecture.py"]
    derived = [path.name for path, text in texts.items() if re.search(r"kv_channels or|groups or \w+\.num_att", text)]
    assert derived == []
