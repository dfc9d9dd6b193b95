"""A family is one row in one file: nothing else knows its names, rows do not overlap, and one more file is one more."""

from __future__ import annotations

import ast
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from phd_megatron.config.moe import MoE
from phd_megatron.config.rope import Yarn
from phd_megatron.data.tokenizers import load_tokenizer
from phd_megatron.huggingface import families, installed
from phd_megatron.huggingface.architecture import Architecture
from phd_megatron.huggingface.export import export_checkpoint
from phd_megatron.huggingface.families import BUNDLED, FAMILIES, export_family
from phd_megatron.norm.schemes import NORM_SCHEMES
from phd_megatron.phd.kv_policy import KVPolicy

from .test_import import SIZES, run, tensors

ROOT = Path(__file__).resolve().parents[2]
HOMES = ("phd_megatron/huggingface/families/", "phd_megatron/huggingface/bundle/")
CLASSES = {row.model_class for row in FAMILIES.values()}
KINDS = set(FAMILIES) - set(NORM_SCHEMES)  # some schemes are called as the family is


def names_in(tree: ast.AST) -> set[str]:
    """Identifiers and texts of a file, without docstrings."""
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in docs}
    found |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    found |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name for name in found if isinstance(name, str)}


def test_nothing_else_knows_the_name_of_a_family():
    """The bench of Hugging Face's trainer builds a Llama of transformers to race against, and asks no family."""
    found = {}
    for path in sorted((ROOT / "phd_megatron").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(HOMES) or name == "phd_megatron/bench/hugging_face.py":
            continue
        known = CLASSES | KINDS if name.startswith("phd_megatron/huggingface/") else CLASSES
        if both := names_in(ast.parse(path.read_text("utf-8"))) & known:
            found[name] = both
    assert found == {}


def test_each_file_is_a_row():
    files = [path for place in families.__path__ for path in Path(place).glob("[!_]*.py")]
    assert len(files) == len(FAMILIES) == len(CLASSES)


@pytest.mark.parametrize("row", FAMILIES.values(), ids=list(FAMILIES))
def test_a_row_names_what_is_there(row):
    import transformers

    if row.is_bundled:
        model, config = installed.model_class(), installed.config_class()
    else:
        model = getattr(transformers, row.model_class)
        config = model.config_class
    assert (model.__name__, config.model_type) == (row.model_class, row.model_type)
    assert row.norm_scheme in (None, *NORM_SCHEMES)


BASE = Architecture(
    **{"num_layers": 2, "hidden_size": 48, "ffn_hidden_size": 80, "heads": 6, "groups": 2, "head_dim": 8},
    **{"vocab_size": 257, "max_position_embeddings": 64, "rotary_base": 1e4, "rotary_percent": 1.0},
    **{"normalization": "RMSNorm", "epsilon": 1e-5, "gated": True, "qkv_bias": False, "linear_bias": False},
    **{"tied": False, "init_std": 0.02, "norm_scheme": "pre", "policy": KVPolicy.from_options(1, 1, None)[0]},
)
EXPERTS = MoE(experts=4, topk=2, layers=(True, True), ffn_hidden_size=24)
#: each changes what a Llama of transformers cannot be
NOT_PLAIN = [
    {"policy": KVPolicy.from_options(2, 4, None)[0]},
    {"normalization": "LayerNorm"},
    {"gated": False},
    {"qkv_bias": True},
    {"linear_bias": True},
    {"rotary_percent": 0.5},
    {"rope": Yarn(4.0, 32)},  # 128 positions, and the model has 64
    {"heads": 5},
]
#: likewise of the experts of any class of transformers
NOT_SIMPLE = [
    {"score_function": "sigmoid"},
    {"groups": 2},
    {"scaling": 2.5},
    {"shared_hidden_size": 16},
    {"router_dtype": "fp64"},
]


def test_at_most_one_class_of_transformers_computes_a_model():
    counts = set()
    routed = [{"pre_softmax": softmax, "layers": layers} for softmax in (True, False) for layers in ((1, 1), (0, 1))]
    kinds = [None, *(replace(EXPERTS, **changes) for changes in (*routed, *NOT_SIMPLE))]
    for scheme, moe, changes in itertools.product(NORM_SCHEMES, kinds, [{}, *NOT_PLAIN]):
        model = replace(BASE, norm_scheme=scheme, moe=moe, **changes)
        able = [row for row in FAMILIES.values() if row.computes(model)]
        assert able[-1] is BUNDLED and len(able) <= 2, (scheme, moe, changes)
        assert export_family(model) is able[0] and export_family(model, native=False) is BUNDLED
        counts.add(len(able))
    assert counts == {1, 2}


@pytest.mark.parametrize("scheme", ["pre", "pre_qk", "olmo2"])
@pytest.mark.parametrize("changes", NOT_PLAIN, ids=str)
def test_what_is_not_plain_is_bundled(scheme, changes):
    model = replace(BASE, norm_scheme=scheme)
    assert export_family(model) is not BUNDLED and export_family(replace(model, **changes)) is BUNDLED


@pytest.mark.parametrize("scheme", ["pre", "pre_qk", "olmoe"])
@pytest.mark.parametrize("changes", [*NOT_SIMPLE, *NOT_PLAIN], ids=str)
def test_experts_that_are_not_simple_are_bundled(scheme, changes):
    model = replace(BASE, norm_scheme=scheme, moe=EXPERTS)
    assert export_family(model) is not BUNDLED
    changed = replace(EXPERTS, **changes) if changes in NOT_SIMPLE else EXPERTS
    other = {} if changes in NOT_SIMPLE else changes
    assert export_family(replace(model, moe=changed, **other)) is BUNDLED


@pytest.fixture
def one_more(monkeypatch):
    """Another folder beside the families' own, whose file is a family from then on."""
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(Path(__file__).with_name("one_more"))])
    found = families.found()
    (new,) = found.keys() - FAMILIES.keys()
    monkeypatch.setitem(FAMILIES, new, found[new])
    yield found[new]
    del sys.modules[f"{families.__name__}.{new}"]


@pytest.mark.parametrize("tied", [False, True])
def test_one_file_is_one_more_family(one_more, tmp_path, tied):
    """A directory of transformers' own comes in, and goes out as the same class with the same tensors and logits.

    ``--verify full`` compares with Megatron's logits, both ways.
    """
    from transformers import Exaone4Config, Exaone4ForCausalLM

    layers = ["full_attention"] * SIZES["num_hidden_layers"]
    config = Exaone4Config(**SIZES, sliding_window=None, layer_types=layers, tie_word_embeddings=tied)
    torch.manual_seed(0)
    model = Exaone4ForCausalLM(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path / "source")
    load_tokenizer("byte").save(tmp_path / "source")
    assert run("--hf-dir", tmp_path / "source", "--output", tmp_path / "save") == 0
    report = export_checkpoint(tmp_path / "save", tmp_path / "hf", verify="full")
    assert report.model_class == one_more.model_class and not list((tmp_path / "hf").glob("*.py"))
    before, after = tensors(tmp_path / "source"), tensors(tmp_path / "hf")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    content = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (content["model_type"], content["norm_scheme"]) == (one_more.model_type, one_more.norm_scheme)


def test_without_its_file_it_is_bundled_and_not_imported(tmp_path, capsys):
    assert export_family(replace(BASE, norm_scheme="outputnorm")) is BUNDLED
    (tmp_path / "config.json").write_text('{"model_type": "exaone4"}')
    assert run("--hf-dir", tmp_path, "--output", tmp_path / "save") == 2
    assert "'exaone4'; llama, qwen3, olmo2, mixtral, qwen3_moe, olmoe, phd_transformer can" in capsys.readouterr().err
