"""Export of Megatron checkpoints: exact, complete or nothing, usable without this package."""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from phd_megatron.checkpoint import checksums
from phd_megatron.cli.main import main
from phd_megatron.errors import UserError
from phd_megatron.huggingface import export
from phd_megatron.huggingface.bundle_files import bundle_files
from phd_megatron.huggingface.checkpoint import MegatronCheckpoint
from phd_megatron.huggingface.export import describe
from phd_megatron.huggingface.families import BUNDLED
from phd_megatron.huggingface.mapping import model_rules
from phd_megatron.huggingface.shards import parse_size, plan_shards

PHD = {"norm_scheme": "hybrid_star", "phd_repeat": 2, "phd_window": 16, "phd_chunk": 32}
ROOT = Path(__file__).resolve().parents[2]
#: logits need a process of their own and are compared in test_against_megatron.py
export_checkpoint = functools.partial(export.export_checkpoint, verify="tensors")


def load(directory, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options).eval()


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize(
    "scheme", ["pre", "pre_qk", "post", "hybrid", "hybrid_star", "olmo2", "embed_norm", "pre_qkvc_post"]
)
def test_every_tensor_by_hand(make_checkpoint, tmp_path, scheme):
    """Names and rows of an export, without the mapping rules."""
    source = make_checkpoint(norm_scheme=scheme, phd_repeat=2, untie_embeddings_and_output_weights=True)
    report = export_checkpoint(source, tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    checkpoint = MegatronCheckpoint(source)
    read = {key: checkpoint.read(key) for key in checkpoint.tensors}
    same = torch.equal
    assert same(tensors.pop("model.embed_tokens.weight"), read.pop("embedding.word_embeddings.weight")[:257])
    assert same(tensors.pop("lm_head.weight"), read.pop("output_layer.weight")[:257])
    assert same(tensors.pop("model.norm.weight"), read.pop("decoder.final_layernorm.weight"))
    if scheme == "embed_norm":
        assert same(tensors.pop("model.embed_norm.weight"), read.pop("embed_norm.weight"))
    for i in range(3):
        hf, mcore = f"model.layers.{i}", f"decoder.layers.{i}"
        qkv = read.pop(f"{mcore}.self_attention.linear_qkv.weight")  # two groups of three queries, a key, a value
        assert same(tensors.pop(f"{hf}.self_attn.q_proj.weight"), torch.cat([qkv[:24], qkv[40:64]]))
        assert same(tensors.pop(f"{hf}.self_attn.k_proj.weight"), torch.cat([qkv[24:32], qkv[64:72]]))
        assert same(tensors.pop(f"{hf}.self_attn.v_proj.weight"), torch.cat([qkv[32:40], qkv[72:80]]))
        fc1 = read.pop(f"{mcore}.mlp.linear_fc1.weight")
        assert same(tensors.pop(f"{hf}.mlp.gate_proj.weight"), fc1[:40])
        assert same(tensors.pop(f"{hf}.mlp.up_proj.weight"), fc1[40:])
        names = {"self_attn.o_proj": "self_attention.linear_proj", "mlp.down_proj": "mlp.linear_fc2"}
        names |= {"input_layernorm": "input_layernorm", "post_attention_layernorm": "pre_mlp_layernorm"}
        names |= {name: name for name in ("attention_output_layernorm", "mlp_output_layernorm")}
        names |= {f"self_attn.{part}_norm": f"self_attention.{part}_layernorm" for part in "qkvc"}
        for new, old in names.items():
            if f"{mcore}.{old}.weight" in read:
                assert same(tensors.pop(f"{hf}.{new}.weight"), read.pop(f"{mcore}.{old}.weight"))
    assert not tensors and not read
    assert report.verified and report.model_class == "PHDForCausalLM"
    assert report.tensors_read == len(checkpoint.tensors)


@pytest.mark.parametrize(
    "fields",
    [
        {"norm_scheme": "pre", "phd_window": 4},
        {"norm_scheme": "pre", "phd_repeat": 2, "phd_window": 4},
        {"norm_scheme": "hybrid", "normalization": "LayerNorm", "add_bias_linear": True, "gated_linear_unit": False},
        {"norm_scheme": "pre", "add_qkv_bias": True, "rotary_percent": 0.5},
        {"norm_scheme": "hybrid_star", "dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_round_trip_and_verification(make_checkpoint, tmp_path, fields):
    source = make_checkpoint(**fields)
    report = export_checkpoint(source, tmp_path / "hf", native=False)
    model = load(tmp_path / "hf")
    assert model.dtype == fields.get("dtype", torch.float32)
    checkpoint = MegatronCheckpoint(source)
    architecture, _ = describe(checkpoint)
    state = model.state_dict()
    for rule in model_rules(architecture, BUNDLED):
        found, expected = rule.to_mcore(state), checkpoint.read(rule.mcore)
        assert torch.equal(found, expected[: found.size(0)]), rule
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for name in ("phd_repeat", "phd_window", "phd_chunk", "norm_scheme", "vocab_size"):
        assert getattr(model.config, name) == config[name]
    assert (config["vocab_size"], config["eos_token_id"], config["bos_token_id"]) == (257, 256, None)


@pytest.mark.parametrize(
    ("scheme", "name"),
    [("pre", "LlamaForCausalLM"), ("pre_qk", "Qwen3ForCausalLM"), ("olmo2", "Olmo2ForCausalLM")],
)
def test_native_classes_compute_what_the_bundled_code_computes(make_checkpoint, tmp_path, scheme, name):
    source = make_checkpoint(norm_scheme=scheme, rotary_base=5000.0)
    assert export_checkpoint(source, tmp_path / "native").model_class == name
    assert export_checkpoint(source, tmp_path / "bundled", native=False).model_class == "PHDForCausalLM"
    assert not list((tmp_path / "native").glob("*.py"))
    native, bundled = load(tmp_path / "native"), load(tmp_path / "bundled")
    assert type(native).__name__ == name
    tokens = torch.randint(257, (2, 40))
    found, expected = logits(bundled, tokens), logits(native, tokens)
    assert (found - expected).norm() / expected.norm() < 1e-6

    from transformers import AutoTokenizer

    text = "naïve def main():\n\tpass"
    for directory, remote in (("native", False), ("bundled", True)):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / directory, trust_remote_code=remote)
        assert tokenizer(text)["input_ids"] == list(text.encode())
        assert tokenizer.decode(list(text.encode())) == text and tokenizer.eos_token_id == 256


def test_shards_dtype_sizes_and_determinism(make_checkpoint, tmp_path):
    source = make_checkpoint(**PHD)
    one = export_checkpoint(source, tmp_path / "one", dtype="bfloat16")
    many = export_checkpoint(source / "iter_0000100", tmp_path / "many", dtype="bfloat16", max_shard_size="8KB")
    assert one.shards == 1 and many.shards > 3 and one.bytes_written == many.bytes_written
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == many.bytes_written
    files = {name: load_file(tmp_path / "many" / name) for name in set(index["weight_map"].values())}
    assert {path.name for path in (tmp_path / "many").glob("*.safetensors")} == set(files)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert set(whole) == set(index["weight_map"]) == {key for tensors in files.values() for key in tensors}
    for key, name in index["weight_map"].items():
        assert whole[key].dtype == torch.bfloat16 and torch.equal(whole[key], files[name][key])
    export_checkpoint(source, tmp_path / "again", dtype="bfloat16", verify="none")
    for path in (tmp_path / "one").iterdir():
        if path.name != "README.md":  # it bears the directory's name
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert parse_size("1.5 MiB") == 3 * 2**19
    with pytest.raises(UserError, match="max_shard_size='big'"):
        export_checkpoint(source, tmp_path / "x", max_shard_size="big")
    with pytest.raises(UserError, match="dtype='int8'"):
        export_checkpoint(source, tmp_path / "x", dtype="int8")


def test_files_are_byte_copies(make_checkpoint, tmp_path):
    source = make_checkpoint(**PHD)
    export_checkpoint(source, tmp_path / "hf")
    for name, path in bundle_files().items():
        assert (tmp_path / "hf" / name).read_bytes() == path.read_bytes()
    for path in (source / "iter_0000100" / "tokenizer").iterdir():
        assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes()
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "PHD-CSWA-2-16-32" in card and "102,400 (1,600 samples)" in card
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_save_pretrained_keeps_everything(make_checkpoint, tmp_path):
    export_checkpoint(make_checkpoint(**PHD), tmp_path / "hf")
    model = load(tmp_path / "hf")
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    expected, found = model.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert "lm_head.weight" not in load_file(tmp_path / "again" / "model.safetensors")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    tokens = torch.randint(257, (1, 40))
    assert torch.equal(logits(model, tokens), logits(again, tokens))


def damage(name):
    def edit(tensors):
        if name == "left over":
            tensors["decoder.layers.0.self_attention.gate.weight"] = torch.zeros(3)
        elif name == "missing":
            del tensors["decoder.layers.2.mlp.linear_fc2.weight"]
        elif name == "another shape":
            tensors["decoder.layers.1.mlp.linear_fc1.weight"] = torch.zeros(80, 32)
        elif name == "small vocabulary":
            tensors["embedding.word_embeddings.weight"] = torch.zeros(256, 24)
        elif name == "not finite":
            tensors["decoder.final_layernorm.weight"] = torch.full((24,), float("nan"))

    return edit


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("left over", "has no place for: decoder.layers.0.self_attention.gate.weight"),
        ("missing", "lacks 1 tensor.*decoder.layers.2.mlp.linear_fc2.weight"),
        ("another shape", r"linear_fc1.weight has shape \(80, 32\)"),
        ("small vocabulary", "does not fit"),
        ("not finite", "not finite|do not give"),
    ],
)
def test_a_checkpoint_that_does_not_fit_leaves_nothing(make_checkpoint, tmp_path, name, message):
    source = make_checkpoint(edit=damage(name), **PHD)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=message):
        export_checkpoint(source, tmp_path / "out" / "hf")
    assert not list((tmp_path / "out").iterdir())


def test_a_flipped_byte_is_refused_and_named(make_checkpoint, tmp_path):
    source = make_checkpoint(**PHD)
    said: list[str] = []
    export_checkpoint(source, tmp_path / "old", verify="none", log=said.append)
    assert any("has no checksums.json" in line for line in said), "an earlier release saved it"

    directory = source / "iter_0000100"
    checksums.write_manifest(directory, {}, {})
    export_checkpoint(source, tmp_path / "good", verify="none")
    shard = next(directory.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=rf"{shard} is damaged: its crc32"):
        export_checkpoint(source, tmp_path / "hf")
    command = ["generate", "--checkpoint", str(source), "--prompt", "a", "--max-new-tokens", "1", "--device", "cpu"]
    assert main(command) == 2
    assert main([*command, "--no-verify-checkpoint"]) == 0
    assert main(["export", "--checkpoint", str(source), "--output", str(tmp_path / "hf")]) == 2
    assert not (tmp_path / "hf").exists()
    export_checkpoint(source, tmp_path / "hf", verify="none", verify_checkpoint=False)


def test_damaged_files_and_settings_are_named(make_checkpoint, tmp_path):
    source = make_checkpoint("cut", **PHD)
    shard = next(source.glob("*/*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-2000])
    with pytest.raises(UserError, match="distcp is truncated"):
        export_checkpoint(source, tmp_path / "hf")
    source = make_checkpoint("unfinished")
    (source / "iter_0000100" / "metadata.json").unlink()
    with pytest.raises(UserError, match=r"not a complete checkpoint|no complete checkpoint"):
        export_checkpoint(source, tmp_path / "hf")
    source = make_checkpoint("nameless")
    (source / "iter_0000100" / "run_config.yaml").unlink()
    with pytest.raises(UserError, match=r"run_config.yaml is missing"):
        export_checkpoint(source, tmp_path / "hf")
    with pytest.raises(UserError, match=r"softmax_scale=0.5"):
        export_checkpoint(make_checkpoint("scaled", transformer={"softmax_scale": 0.5}), tmp_path / "hf")
    with pytest.raises(UserError, match=r"tokenizer .* has 257 tokens, the model 200"):
        export_checkpoint(make_checkpoint("words", vocab_size=200), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    source = make_checkpoint("harmless", tokenizer=False, transformer={"recompute_granularity": "full"})
    assert export_checkpoint(source, tmp_path / "hf").verified == "tensors"


def test_an_existing_directory_is_replaced_only_on_request_and_only_by_a_whole_one(
    make_checkpoint, tmp_path, monkeypatch
):
    good = make_checkpoint("good", **PHD)
    output = tmp_path / "out" / "hf"
    export_checkpoint(good, output)
    before = (output / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="--overwrite"):
        export_checkpoint(good, output)
    other = make_checkpoint("other", seed=1, **PHD)

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("phd_megatron.huggingface.verify.verify_export", stop)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(other, output, overwrite=True)
    assert (output / "model.safetensors").read_bytes() == before
    monkeypatch.undo()
    export_checkpoint(other, output, overwrite=True)
    assert (output / "model.safetensors").read_bytes() != before
    assert [path.name for path in output.parent.iterdir()] == ["hf"]


def test_a_failed_verification_is_noticed(make_checkpoint, tmp_path, monkeypatch):
    """The check can fail: a rule that swaps two projections loads well and is caught."""
    from phd_megatron.huggingface.mapping import GatedMLP

    monkeypatch.setattr(
        GatedMLP, "to_hf", lambda self, tensor: dict(zip(reversed(self.hf), tensor.chunk(2), strict=True))
    )
    with pytest.raises(UserError, match=r"do not give decoder.layers.0.mlp.linear_fc1.weight back"):
        export_checkpoint(make_checkpoint(**PHD), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


CLEAN = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("phd_megatron", "megatron", "yaml_never"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Refuse())
from transformers import AutoModelForCausalLM, AutoTokenizer
directory = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
inputs = tokenizer(["Once upon", "a"], return_tensors="pt", padding=True, padding_side="left")
out = model.generate(**inputs, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=256)
print(out[0, -40:].tolist())
assert not [name for name in sys.modules if name.split(".")[0] in ("phd_megatron", "megatron")]
"""


def test_the_directory_works_where_this_package_does_not_exist(make_checkpoint, tmp_path):
    export_checkpoint(make_checkpoint(**PHD), tmp_path / "hf")
    works_alone(tmp_path)


def works_alone(tmp_path):
    """``tmp_path/hf``, moved, generates in a process that refuses this package and Megatron."""
    moved = tmp_path / "elsewhere" / "my model-1.0"
    moved.parent.mkdir()
    (tmp_path / "hf").rename(moved)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", CLEAN, str(moved)],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    model = load(moved)
    tokens = torch.tensor([list(b"Once upon")])
    expected = model.generate(tokens, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=256)
    assert json.loads(done.stdout.splitlines()[-1]) == expected[0, -40:].tolist()


def test_commands(make_checkpoint, tmp_path, capsys):
    source = str(make_checkpoint(**PHD))
    output = str(tmp_path / "hf")
    assert main(["export", "--checkpoint", source, "--output", output]) == 0
    assert "PHDForCausalLM" in capsys.readouterr().out
    assert main(["export", "--checkpoint", source, "--output", output]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["export", "--checkpoint", source, "--ouput", output]) == 2
    assert "did you mean --output" in capsys.readouterr().err

    texts = []
    for path in (source, output):
        assert main(["generate", "--checkpoint", path, "--prompt", "def main", "--max-new-tokens", "40"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].split("\n\n")[0] == texts[1].split("\n\n")[0]
    assert "47 entries + 16 hidden entries;" in texts[0] and "tokens/s" in texts[0]
    sampled = ["generate", "--checkpoint", output, "--prompt", "x", "--temperature", "0.9", "--top-p", "0.95", "--seed"]
    seen = []
    for seed in ("1", "1", "2"):
        assert main([*sampled, seed]) == 0
        seen.append(capsys.readouterr().out.split("\n\n")[0])
    assert seen[0] == seen[1] != seen[2]
    for wrong, message in (
        (["--temperature", "0"], "temperature=0.0"),
        (["--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--greedy", "--top-k", "4"], "exclude each other"),
    ):
        assert main(["generate", "--checkpoint", output, "--prompt", "x", *wrong]) == 2
        assert message in capsys.readouterr().err
    changed = shutil.copytree(output, tmp_path / "changed")
    with open(changed / "modeling_phd.py", "a") as stream:
        stream.write("print('its own code runs')\n")
    short = ["generate", "--checkpoint", str(changed), "--prompt", "def main", "--max-new-tokens", "40"]
    assert main(short) == 0
    said = capsys.readouterr().out
    assert said.split("\n\n")[0] == texts[0].split("\n\n")[0] and "its own code runs" not in said
    assert main([*short, "--trust-remote-code"]) == 0
    assert "its own code runs" in capsys.readouterr().out
    assert main(["generate", "--checkpoint", str(tmp_path / "nowhere"), "--prompt", "x"]) == 2


def test_convert_checkpoint_script(make_checkpoint, tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py"), "--checkpoint", str(make_checkpoint())]
    done = subprocess.run([*command, "--output", str(tmp_path / "hf")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "LlamaForCausalLM" in done.stdout


def test_no_weight_file_is_larger_than_asked_unless_one_tensor_is(make_checkpoint):
    source = MegatronCheckpoint(make_checkpoint())
    rules = model_rules(describe(source)[0], BUNDLED)

    def size_of(rule, dtype):
        outline = torch.empty(source.shape(rule.mcore), dtype=rule.dtype(dtype), device="meta")
        return sum(part.nbytes for part in rule.to_hf(outline).values())

    for dtype in (torch.float32, torch.bfloat16):
        sizes = [size_of(rule, dtype) for rule in rules]
        for limit in (1, max(sizes), 2 * max(sizes) - 1, sum(sizes) - 1, sum(sizes)):
            shards = plan_shards(source, rules, dtype, limit)
            assert [rule for shard in shards for rule in shard] == rules
            found = [[size_of(rule, dtype) for rule in shard] for shard in shards]
            assert all(sum(shard) <= limit or len(shard) == 1 for shard in found)
            # and none ends before the next tensor would be too much for it
            assert all(sum(shard) + after[0] > limit for shard, after in itertools.pairwise(found))
