"""Hugging Face directories of all families become checkpoints, and the same directories again, tensor for tensor."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from phd_megatron.cli.main import main
from phd_megatron.config.serialize import load_yaml
from phd_megatron.data.tokenizers import load_tokenizer
from phd_megatron.errors import UserError
from phd_megatron.huggingface import verify
from phd_megatron.huggingface.checkpoint import MegatronCheckpoint
from phd_megatron.huggingface.config_json import read_config
from phd_megatron.huggingface.export import export_checkpoint
from phd_megatron.huggingface.families import FAMILIES
from phd_megatron.huggingface.importing.spellings import check_spellings

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    **{"vocab_size": 261, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3},
    **{"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2},
    **{"bos_token_id": None, "eos_token_id": 256, "pad_token_id": 256},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
SOURCES = {
    "llama": ("Llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama, wide heads": ("Llama", {"head_dim": 16}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "olmo2": ("Olmo2", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3_moe": (
        "Qwen3Moe",
        {**EXPERTS, "head_dim": 8, "moe_intermediate_size": 24, "norm_topk_prob": True, "mlp_only_layers": [1]},
    ),
    "qwen3_moe, softmax over all": ("Qwen3Moe", {**EXPERTS, "head_dim": 8, "moe_intermediate_size": 24}),
    "olmoe": ("Olmoe", EXPERTS),
}


@pytest.fixture
def make_source(tmp_path):
    """``make_source(name, dtype, **fields)``: a directory that transformers wrote, with our byte tokenizer."""

    def make(name, dtype=torch.float32, **fields):
        import transformers

        family, own = SOURCES[name]
        config = getattr(transformers, f"{family}Config")(**{**SIZES, **own, **fields})
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "norm" in key:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        directory = tmp_path / "source"
        model.save_pretrained(directory, max_shard_size="20KB" if name == "llama" else "5GB")
        load_tokenizer("byte").save(directory)
        return directory

    return make


def tensors(directory):
    found = {}
    for path in directory.glob("*.safetensors"):
        found |= load_file(path)
    return found


def run(*words):
    return main(["import", *map(str, words)])


@pytest.mark.parametrize("name", SOURCES)
def test_round_trip_is_exact_and_logits_are_transformers(make_source, tmp_path, name):
    """``--verify full`` compares logits with transformers within 1e-5, on import and, with our own code, on export."""
    source = make_source(name)
    assert run("--hf-dir", source, "--output", tmp_path / "save") == 0
    report = export_checkpoint(tmp_path / "save", tmp_path / "hf", verify="full")
    assert report.model_class == json.loads((source / "config.json").read_text())["architectures"][0]
    before, after = tensors(source), tensors(tmp_path / "hf")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_type_is_kept(make_source, tmp_path, name):
    source = make_source(name, torch.bfloat16)
    assert run("--hf-dir", source, "--output", tmp_path / "save", "--verify", "none") == 0
    checkpoint = MegatronCheckpoint(tmp_path / "save")
    assert checkpoint.run.training.bf16 and checkpoint.dtype("decoder.final_layernorm.weight") == torch.bfloat16
    export_checkpoint(tmp_path / "save", tmp_path / "hf", verify="none")
    after = tensors(tmp_path / "hf")
    assert all(torch.equal(tensor, after[key]) for key, tensor in tensors(source).items())


@pytest.mark.parametrize(
    "fields",
    [
        {"norm_scheme": "hybrid_star", "phd_repeat": 2, "phd_window": 16, "phd_chunk": 32},
        {"norm_scheme": "pre", "add_bias_linear": True, "normalization": "LayerNorm", "gated_linear_unit": False},
        {"norm_scheme": "pre", "phd_repeat": 3, "phd_window": 4, "untie_embeddings_and_output_weights": True},
        {"norm_scheme": "hybrid", "phd_repeat": 3, "phd_copy_positions": "repeated", "phd_copy_embedding": "vector"},
    ],
    ids=str,
)
def test_our_own_exports_come_back(make_checkpoint, tmp_path, fields):
    export_checkpoint(make_checkpoint(**fields), tmp_path / "hf", verify="none", native=False)
    assert run("--hf-dir", tmp_path / "hf", "--output", tmp_path / "save") == 0
    export_checkpoint(tmp_path / "save", tmp_path / "again", verify="tensors", native=False)
    before, after = tensors(tmp_path / "hf"), tensors(tmp_path / "again")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "again")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    ("name", "positions", "embedding"),
    [("llama", "token", "none"), ("qwen3", "fraction", "vector"), ("qwen3_moe", "fraction", "vector")],
)
def test_go_on_as_a_phd_model(make_source, tmp_path, capsys, name, positions, embedding):
    """``--verify full`` has held the originals to the source's tokens after every layer but the last."""
    source = make_source(name)
    words = ("--phd-repeat", 3, "--seq-length", 32, "--make-vocab-size-divisible-by", 16)
    words += ("--phd-copy-positions", positions, "--phd-copy-embedding", embedding)
    assert run("--hf-dir", source, "--output", tmp_path / "save", *words) == 0
    said = re.search(r"loss of a text at step 0: (\S+) with copies, (\S+) of ", capsys.readouterr().out)
    assert said is not None and float(said[1]) != float(said[2]) and abs(float(said[1]) - float(said[2])) < 1
    model = load_yaml(next(tmp_path.glob("save/iter_*/run_config.yaml"))).model
    assert (model.phd_repeat, model.phd_window, model.phd_chunk, model.seq_length) == (3, 16, 32, 32)
    assert (model.phd_copy_positions, model.phd_copy_embedding) == (positions, embedding)
    checkpoint = MegatronCheckpoint(tmp_path / "save")
    assert checkpoint.shape("embedding.word_embeddings.weight") == (272, 48)
    if embedding == "vector":
        assert checkpoint.shape("copy_embedding.weight") == (2, 48)
        assert not checkpoint.read("copy_embedding.weight").any()


def test_experts_that_see_a_few_rows_are_no_mistake(make_source, tmp_path, monkeypatch):
    """Products of one to three rows are rounded otherwise than those of more, which copies make of them."""
    errors, genuine = [], verify._relative
    monkeypatch.setattr(verify, "_relative", lambda one, two: errors.append(genuine(one, two)) or errors[-1])
    source = make_source("qwen3_moe", num_experts=128, num_experts_per_tok=2, mlp_only_layers=[])
    words = ("--phd-repeat", 2, "--phd-copy-positions", "fraction", "--phd-copy-embedding", "vector")
    assert run("--hf-dir", source, "--output", tmp_path / "save", *words) == 0
    assert len(errors) > 1 and 0 < errors[-1] < 1e-5, "the originals' bits differ, or this shows nothing"


def test_originals_that_are_not_the_sources_are_noticed(make_source, tmp_path, capsys, monkeypatch):
    from phd_megatron.huggingface.importing import checkpoint as hf_import

    monkeypatch.setattr(hf_import, "_check_copies", lambda *_: None)
    words = ("--phd-repeat", 2, "--phd-copy-positions", "repeated")
    assert run("--hf-dir", make_source("llama"), "--output", tmp_path / "save", *words) == 2
    assert "originals are not the source's" in capsys.readouterr().err and not (tmp_path / "save").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--phd-repeat", 2, "--phd-copy-positions", "repeated"), "puts tokens 2 RoPE positions apart"),
        (("--phd-window", 4), "--phd-window 4: no effect"),
        (("--phd-copy-embedding", "vector"), "--phd-copy-embedding vector: no effect"),
    ],
)
def test_copies_that_could_not_be_exact_or_have_no_effect_are_refused(make_source, tmp_path, capsys, words, message):
    assert run("--hf-dir", make_source("llama"), "--output", tmp_path / "save", *words) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "save").exists()


def test_upcycled_experts_compute_what_the_ffn_computed(make_source, tmp_path):
    """``--verify full`` has compared the logits of the model with experts with those of the dense one."""
    source = make_source("qwen3")
    assert run("--hf-dir", source, "--output", tmp_path / "save", "--upcycle-experts", 4, "--moe-router-topk", 2) == 0
    checkpoint = MegatronCheckpoint(tmp_path / "save")
    experts = checkpoint.read("decoder.layers.1.mlp.experts.experts.linear_fc2.weight")
    dense = tensors(source)["model.layers.1.mlp.down_proj.weight"]
    assert experts.shape == (4, *dense.shape) and all(torch.equal(expert, dense) for expert in experts)
    router = checkpoint.read("decoder.layers.1.mlp.router.weight")
    assert router.std() > 0.05 and not torch.equal(router, checkpoint.read("decoder.layers.0.mlp.router.weight"))
    export_checkpoint(tmp_path / "save", tmp_path / "hf", verify="tensors")


def test_what_is_told_is_where_the_checkpoint_is_found(make_source, tmp_path, capsys):
    """The save's line named the temporary directory, which is gone when the line is read."""
    assert run("--hf-dir", make_source("llama"), "--output", tmp_path / "save", "--verify", "none") == 0
    lines = capsys.readouterr().out.splitlines()
    assert not any(".tmp" in line for line in lines)
    saved = [line for line in lines if line.startswith(f"saved checkpoint {tmp_path / 'save' / 'iter_0000000'} (")]
    assert len(saved) == 1 and (tmp_path / "save" / "iter_0000000" / "metadata.json").is_file()


def test_a_difference_is_noticed_and_nothing_stays(make_source, tmp_path, monkeypatch):
    source = make_source("llama")
    monkeypatch.setattr(verify, "TOLERANCE", 1e-12)
    assert run("--hf-dir", source, "--output", tmp_path / "save") == 2
    assert not (tmp_path / "save").exists()


REFUSED = [
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "RoPE of type 'linear'"),
    ("llama", {"attention_bias": True}, "attention_bias=True: this family's biases"),
    ("llama", {"mlp_bias": True}, "mlp_bias=True"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ("llama", {"quantization_config": {"quant_method": "x"}}, "quantization_config="),
    ("llama", {"logit_softcapping": 30.0}, "logit_softcapping=30.0: nothing here corresponds to it"),
    ("qwen3", {"use_sliding_window": True}, "use_sliding_window=True"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "only full_attention"),
    ("mixtral", {"sliding_window": 4096}, "sliding_window=4096"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
]


@pytest.mark.parametrize(("kind", "fields", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_what_cannot_be_represented_is_refused_by_name(kind, fields, message):
    import transformers

    family = FAMILIES[kind]
    content = getattr(transformers, family.model_class.replace("ForCausalLM", "Config"))().to_dict()
    if kind == "mixtral":
        content["sliding_window"] = None
    assert read_config(content, family).num_layers == content["num_hidden_layers"]
    with pytest.raises(UserError) as refusal:
        read_config({**content, **fields}, family)
    lines = str(refusal.value).splitlines()
    assert message in lines[1] and len(lines) == 3, "nothing else is refused with it"


@pytest.mark.parametrize("kind", ["qwen3_moe", "olmoe"])
def test_words_about_experts(kind):
    import transformers

    family = FAMILIES[kind]
    config = getattr(transformers, family.model_class.replace("ForCausalLM", "Config"))
    more = {"mlp_only_layers": [1]} if kind == "qwen3_moe" else {}
    for normed in (True, False):
        words = {"num_hidden_layers": 3, "num_experts": 12, "num_experts_per_tok": 5, "norm_topk_prob": normed}
        found = read_config(config(**words, **more).to_dict(), family).transformer
        assert (found["num_moe_experts"], found["moe_router_topk"]) == (12, 5)
        assert found["moe_router_pre_softmax"] is not normed  # softmax over the chosen experts gives 1 by itself
        assert found.get("moe_layer_freq") == ([1, 0, 1] if more else None)


def test_rope_in_the_words_of_transformers_4(make_source, tmp_path, capsys):
    """``rope_theta`` and ``rope_scaling`` beside each other, and no ``rope_parameters``."""
    source = make_source("llama, wide heads", rms_norm_eps=1e-3)
    path = source / "config.json"
    content = json.loads(path.read_text())
    del content["rope_parameters"]
    words = ("--hf-dir", source, "--verify", "none", "--output")
    path.write_text(json.dumps({**content, "rope_theta": 3e5, "rope_scaling": None}))
    assert run(*words, tmp_path / "save") == 0
    model = load_yaml(next(tmp_path.glob("save/iter_*/run_config.yaml"))).model
    assert (model.rotary_base, model.rotary_percent, model.layernorm_epsilon) == (3e5, 1.0, 1e-3)
    assert (model.kv_channels, model.num_query_groups, model.init_method_std) == (16, 2, 0.2)
    for scaling in ({"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 4.0}):
        path.write_text(json.dumps({**content, "rope_theta": 3e5, "rope_scaling": scaling}))
        assert run(*words, tmp_path / "other") == 2
        assert "changes its frequencies" in capsys.readouterr().err and not (tmp_path / "other").exists()


DEFAULT = {"rope_type": "default"}
SPELT_TWICE = [
    ({"rope_theta": 500.0, "rope_parameters": {**DEFAULT, "rope_theta": 1e4}}, "rope_theta=500.0", "10000.0"),
    ({"rope_theta": 500, "rope_parameters": {**DEFAULT, "rope_theta": 500.0}}, None, None),
    ({"rope_theta": 5e5, "rope_scaling": {**DEFAULT, "rope_theta": 8.0}}, "500000.0", "rope_scaling.rope_theta=8.0"),
    ({"rope_theta": 5e5, "rope_scaling": None}, None, None),
    ({"rope_parameters": {**DEFAULT, "rope_theta": 8.0}, "rope_scaling": {"rope_theta": 9.0}}, "=8.0", "=9.0"),
    ({"partial_rotary_factor": 0.5, "rope_parameters": {**DEFAULT, "partial_rotary_factor": 1.0}}, "=0.5", "=1.0"),
    ({"rope_parameters": {"rope_type": "default", "type": "linear"}}, "rope_type='default'", "type='linear'"),
    ({"dtype": "bfloat16", "torch_dtype": "float16"}, "dtype='bfloat16'", "torch_dtype='float16'"),
    ({"dtype": "torch.float16", "torch_dtype": "float16"}, None, None),
    ({"dtype": None, "torch_dtype": "float16"}, None, None),
    ({"num_experts": 4, "num_local_experts": 8}, "num_experts=4", "num_local_experts=8"),
    ({"mlp_bias": True, "attention_output_bias": False}, "mlp_bias=True", "attention_output_bias=False"),
    ({"norm_scheme": "hybrid"}, "norm_scheme='hybrid'", "has 'pre'"),
    ({"norm_scheme": "pre"}, None, None),
    ({}, None, None),
]


def test_what_is_said_twice_is_said_alike():
    """transformers takes one of the two without a word, another one in another release."""
    for content, *both in SPELT_TWICE:
        try:
            check_spellings(Path("x/config.json"), {"model_type": "llama", **content}, "pre")
            said = None
        except UserError as error:
            said = str(error)
        if both[0] is None:
            assert said is None, (content, said)
        else:
            assert said and said.startswith("x/config.json says ") and all(word in said for word in both), content
    check_spellings(Path("x/config.json"), {"norm_scheme": "hybrid"}, None)


def damage(directory, what):
    config = json.loads((directory / "config.json").read_text())
    shards = sorted(directory.glob("model-*.safetensors"))
    if what == "hidden size":
        config["hidden_size"] = 96
    elif what == "layers":
        config["num_hidden_layers"] = 2
    elif what == "theta":
        config["rope_theta"], config["rope_parameters"] = 500.0, {"rope_type": "default", "rope_theta": 10000.0}
    elif what == "family":
        config["model_type"] = "gpt2"
    elif what == "missing shard":
        shards[1].unlink()
    elif what == "truncated":
        shards[0].write_bytes(shards[0].read_bytes()[:-100])
    elif what == "missing tensor":
        content = load_file(shards[-1])
        content.pop(sorted(content)[0])
        save_file(content, shards[-1], metadata={"format": "pt"})
    elif what == "not finite":
        content = load_file(shards[-1])
        content[max(content)].view(-1)[-1] = float("inf")
        save_file(content, shards[-1], metadata={"format": "pt"})
    elif what == "quantised":
        content = load_file(shards[0])
        key = min(key for key in content if content[key].dim() == 2)
        save_file({**content, key: content[key].to(torch.int8)}, shards[0], metadata={"format": "pt"})
    elif what == "vocabulary":
        config["vocab_size"] = 200
    elif what == "no config":
        (directory / "config.json").unlink()
        return
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("hidden size", "do not fit config.json"),
        ("layers", "holds model.layers.2."),
        ("family", "'gpt2'; llama, qwen3"),
        ("theta", "says rope_theta=500.0 and rope_parameters.rope_theta=10000.0, which are one thing"),
        ("missing shard", "is missing; copy the whole directory again"),
        ("truncated", "is damaged"),
        ("missing tensor", "which its config.json describes"),
        ("not finite", "holds values that are not finite"),
        ("quantised", "is of type I8; export it unquantised"),
        ("vocabulary", "do not fit config.json"),
        ("no config", "config.json is missing"),
    ],
)
def test_damage_is_named_and_nothing_is_left(make_source, tmp_path, capsys, what, message):
    source = make_source("llama")
    damage(source, what)
    assert run("--hf-dir", source, "--output", tmp_path / "save") == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "save").exists()


def test_a_tokenizer_that_does_not_fit_and_a_full_directory(make_source, tmp_path, capsys):
    source = make_source("llama", vocab_size=200, eos_token_id=None, pad_token_id=None)
    assert run("--hf-dir", source, "--output", tmp_path / "save") == 2
    assert "257 tokens and the embedding 200 rows" in capsys.readouterr().err
    for path in source.glob("tokenizer*"):
        path.unlink()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert run("--hf-dir", source, "--output", tmp_path / "full") == 2
    assert "exists" in capsys.readouterr().err
    assert run("--hf-dir", source, "--output", tmp_path / "save", "--verify", "none") == 0
    assert "no tokenizer" in capsys.readouterr().out


def test_a_head_that_is_no_copy_of_a_tied_embedding_is_not_dropped(make_source, tmp_path, capsys):
    source = make_source("llama, wide heads", tie_word_embeddings=True)
    file = source / "model.safetensors"
    held = load_file(file)
    words = ("--hf-dir", source, "--output", tmp_path / "save", "--verify", "none")
    for head in (held["model.embed_tokens.weight"] + 1, torch.ones(3, 4)):
        save_file({**held, "lm_head.weight": head}, file, metadata={"format": "pt"})
        assert run(*words) == 2
        said = capsys.readouterr().err
        assert "lm_head.weight, which is not model.embed_tokens.weight" in said and "set that to false" in said
        assert not (tmp_path / "save").exists()
    copy = held["model.embed_tokens.weight"].clone()
    save_file({**held, "lm_head.weight": copy}, file, metadata={"format": "pt"})
    assert run(*words) == 0


def test_an_unknown_scheme_is_refused_and_foreign_code_does_not_run(make_checkpoint, tmp_path, capsys):
    export_checkpoint(make_checkpoint(phd_repeat=2), tmp_path / "hf", verify="none")
    shutil.copytree(tmp_path / "hf", tmp_path / "foreign")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "norm_scheme": "nonsense"}))
    assert run("--hf-dir", tmp_path / "hf", "--output", tmp_path / "save") == 2
    assert "norm_scheme='nonsense'" in capsys.readouterr().err
    for code in (tmp_path / "foreign").glob("*.py"):
        code.write_text("raise SystemExit('its own code runs')\n")
    assert run("--hf-dir", tmp_path / "foreign", "--output", tmp_path / "save") == 0


def test_an_export_of_before_copies_were_told_apart_comes_back(make_checkpoint, tmp_path):
    """``config.json`` has no word about it, and the code beside it is another release's."""
    export_checkpoint(make_checkpoint(norm_scheme="hybrid_star", phd_repeat=2), tmp_path / "hf", verify="none")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for name in ("phd_copy_positions", "phd_copy_embedding"):
        del config[name]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    (tmp_path / "hf" / "copy_positions.py").unlink()
    assert run("--hf-dir", tmp_path / "hf", "--output", tmp_path / "save") == 0
    model = load_yaml(next(tmp_path.glob("save/iter_*/run_config.yaml"))).model
    assert (model.phd_copy_positions, model.phd_copy_embedding) == ("token", "none")


def stopped_while(words, place, pattern, number, tmp_path):
    """Run a command, send it a signal once ``pattern`` is found in ``place``; its exit code and what is left."""
    temporary = tmp_path / "temporary"
    temporary.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    before = sorted(path.name for path in place.iterdir())
    process = subprocess.Popen(
        [sys.executable, "-m", "phd_megatron", *map(str, words)],
        env=environment,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # under nohup the suite ignores one of them
    )
    try:
        deadline = time.monotonic() + 300
        while not list(place.glob(pattern)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(number)
        assert process.wait(300) == 128 + number
    finally:
        process.kill()
        process.wait()
    assert sorted(path.name for path in place.iterdir()) == before
    assert [path for path in temporary.iterdir() if path.name.startswith("phd-megatron")] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_of_an_import(make_source, tmp_path, number):
    words = ["import", "--hf-dir", make_source("llama"), "--output", tmp_path / "start"]
    stopped_while(words, tmp_path, ".start.*.tmp", number, tmp_path)


def test_sigterm_leaves_nothing_of_an_export_and_of_a_temporary_one(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint()
    words = ["export", "--checkpoint", checkpoint, "--output", tmp_path / "hf"]
    stopped_while(words, tmp_path, ".hf.*.tmp", signal.SIGTERM, tmp_path)
    words = ["generate", "--checkpoint", checkpoint, "--prompt", "a", "--max-new-tokens", "60", "--device", "cpu"]
    stopped_while(words, tmp_path / "temporary", "phd-megatron-*", signal.SIGTERM, tmp_path)
