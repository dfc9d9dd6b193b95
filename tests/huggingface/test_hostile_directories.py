"""Hugging Face directories that lie, are damaged or want code run end in one message with value, reason and cure."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from phd_megatron.checkpoint import checksums
from phd_megatron.cli.main import main
from phd_megatron.errors import UserError
from phd_megatron.huggingface.export import _bos, export_checkpoint
from phd_megatron.huggingface.weights import Place, check_config, read_json

PHD = {"norm_scheme": "hybrid_star", "phd_repeat": 2, "phd_window": 4, "phd_chunk": 8}
CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def test_a_json_file_without_end_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as stream:
        stream.write(b"{}")
        stream.truncate((1 << 28) + 1)  # takes no room
    with pytest.raises(UserError, match=r"config.json has 268,435,457 bytes, and 268,435,456 are read; copy it again"):
        read_json(path)


def edited(name, **values):
    def damage(directory):
        path = directory / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return damage


def replaced(name, content):
    def damage(directory):
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def weights(change):
    def damage(directory):
        path = directory / WEIGHTS
        path.write_bytes(change(path.read_bytes()))

    return damage


def header(**values):
    """Another entry of the first tensor in the header of the weights."""

    def change(content):
        size = struct.unpack("<Q", content[:8])[0]
        table = json.loads(content[8 : 8 + size])
        table[next(name for name in table if name != "__metadata__")].update(values)
        text = json.dumps(table).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + size :]

    return weights(change)


class Leaves:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def pickled(how):
    def damage(directory):
        (directory / WEIGHTS).unlink()
        bad = Leaves(directory.parent / "it-ran")
        if how == "torch":
            torch.save({"model.embed_tokens.weight": bad}, directory / "pytorch_model.bin")
        elif how == "plain":
            (directory / "pytorch_model.bin").write_bytes(pickle.dumps(bad))
        else:
            torch.save({"model.norm.weight": torch.ones(24)}, directory / "pytorch_model.bin")

    return damage


def pipe(name):
    def damage(directory):
        (directory / name).unlink()
        os.mkfifo(directory / name)

    return damage


def indexed(content):
    return replaced(INDEX, json.dumps(content))


#: what is done to an export -> what the message must have in it
BAD = {
    # sizes that are not the files'
    "vocabulary": (edited(CONFIG, vocab_size=100), "vocab_size=100.*model.embed_tokens.weight.*257"),
    "heads": (edited(CONFIG, num_attention_heads=3), "num_attention_heads=3 and num_key_value_heads=2.*multiple"),
    "no heads": (edited(CONFIG, num_attention_heads=0), "num_attention_heads=0"),
    "no groups": (edited(CONFIG, num_key_value_heads=0), "num_key_value_heads=0"),
    "layers": (edited(CONFIG, num_hidden_layers=10**9), "num_hidden_layers=1000000000.*they hold .* tensors"),
    "layers as a float": (edited(CONFIG, num_hidden_layers=1e9), "num_hidden_layers=1000000000.0.*whole number"),
    "layers as text": (edited(CONFIG, num_hidden_layers="3"), "num_hidden_layers=3"),
    "no layers": (edited(CONFIG, num_hidden_layers=0), "num_hidden_layers=0"),
    "negative layers": (edited(CONFIG, num_hidden_layers=-1), "num_hidden_layers=-1"),
    "width": (edited(CONFIG, hidden_size=10**9), "hidden_size=1000000000"),
    "width below the bound": (edited(CONFIG, hidden_size=999_996), "999996|99,|parameters"),
    "FFN": (edited(CONFIG, intermediate_size=10**9), "intermediate_size=1000000000"),
    "FFN below the bound": (
        edited(CONFIG, intermediate_size=10**6),
        "216,01.* parameters, .* hold 24,|2000000",
    ),
    "vocabulary of a trillion": (edited(CONFIG, vocab_size=10**12), "vocab_size=1000000000000"),
    "head size": (edited(CONFIG, head_dim=10**9), "head_dim=1000000000"),
    "positions": (edited(CONFIG, max_position_embeddings=10**30), "max_position_embeddings=1000"),
    "no positions": (edited(CONFIG, max_position_embeddings=0), "max_position_embeddings=0"),
    "theta": (edited(CONFIG, rope_parameters={"rope_type": "default", "rope_theta": 0}), "rope_theta=0"),
    "theta as text": (edited(CONFIG, rope_parameters={"rope_type": "default", "rope_theta": "x"}), "rope_theta=x"),
    "RoPE list": (edited(CONFIG, rope_parameters=[1]), "rope_parameters|list"),
    "RoPE kind": (edited(CONFIG, rope_parameters={"rope_type": "odd", "rope_theta": 1e4}), "odd"),
    "epsilon": (edited(CONFIG, rms_norm_eps=float("nan")), "rms_norm_eps=nan"),
    "epsilon as text": (edited(CONFIG, rms_norm_eps="x"), "rms_norm_eps=x"),
    "activation": (edited(CONFIG, hidden_act="odd"), "odd"),
    "type of weights": (edited(CONFIG, dtype="float7"), "float7"),
    "kind of model": (edited(CONFIG, model_type=["llama"]), "list|llama"),
    "kernel to fetch": (edited(CONFIG, attn_implementation="somebody/kernel"), "somebody/kernel.*code of others"),
    "kernel in a mapping": (
        edited(CONFIG, attn_implementation={"": "somebody/kernel"}),
        "attn_implementation='somebody/kernel', code",
    ),
    "kernel inside": (
        edited(CONFIG, a_config={"b": [{"c": {"_attn_implementation_internal": "somebody/kernel@v1:x"}}]}),
        "_attn_implementation_internal='somebody/kernel@v1:x', code",
    ),
    "kernel of experts": (edited(CONFIG, _experts_implementation={"a": {"b": ["x/y"]}}), "_experts_.*='x/y', code"),
    "other weights": (
        edited(CONFIG, transformers_weights="zero.safetensors"),
        "transformers_weights=zero.*another",
    ),
    "quantised": (edited(CONFIG, quantization_config={"quant_method": "fp8"}), "quantization_config=.*unquantised"),
    "end as text": (edited(CONFIG, eos_token_id="x"), "eos_token_id"),
    # files that are no JSON
    "config list": (replaced(CONFIG, "[1]"), "config.json holds no mapping but a list"),
    "config empty": (replaced(CONFIG, ""), "config.json cannot be read"),
    "config binary": (replaced(CONFIG, b"\xff\xfe\x00"), "config.json cannot be read"),
    "config deep": (replaced(CONFIG, "[" * 100_000), "config.json cannot be read.*nested"),
    "config digits": (replaced(CONFIG, '{"vocab_size": ' + "1" * 5000 + "}"), "config.json cannot be read"),
    "generation list": (replaced(GENERATION, "[1]"), "generation_config.json cannot be read"),
    "generation empty": (replaced(GENERATION, ""), "generation_config.json cannot be read"),
    "generation deep": (replaced(GENERATION, "[" * 100_000), "generation_config.json cannot be read"),
    "generation pipe": (pipe(GENERATION), "generation_config.json cannot be read.*regular"),
    "beams": (edited(GENERATION, num_beams=10**9), "num_beams=1e.09.*1 to 1000"),
    "sequences": (edited(GENERATION, num_return_sequences=10**9), "num_return_sequences=1e.09"),
    "warmth as text": (edited(GENERATION, temperature="hot"), "temperature=hot.*a number"),
    "penalty": (edited(GENERATION, repetition_penalty=-1), "repetition_penalty=-1"),
    "end token as text": (edited(GENERATION, eos_token_id="x"), "eos_token_id=x.*token"),
    "end token as float": (edited(GENERATION, eos_token_id=1e30), "eos_token_id=1e.30"),
    "padding list": (edited(GENERATION, pad_token_id=[1, 2]), "pad_token_id=.1, 2."),
    "tokenizer list": (replaced(TOKENIZER, "[1]"), "tokenizer_config.json holds no mapping but a list"),
    "tokenizer empty": (replaced(TOKENIZER, ""), "tokenizer_config.json cannot be read"),
    "tokenizer deep": (replaced(TOKENIZER, "[" * 100_000), "tokenizer_config.json cannot be read.*nested"),
    "tokenizer pipe": (pipe(TOKENIZER), "tokenizer_config.json is no regular file"),
    "vocabulary list": (replaced("tokenizer.json", "[1]"), "tokenizer.json holds no mapping but a list"),
    "special tokens list": (replaced("special_tokens_map.json", "[1]"), "special_tokens_map.json holds no mapping"),
    "added tokens list": (replaced("added_tokens.json", "[1]"), "added_tokens.json holds no mapping"),
    # the index, and files that are elsewhere
    "index list": (indexed([1]), "index.json holds no mapping but a list"),
    "index without a map": (indexed({}), "index.json has no weight_map"),
    "index with a list": (indexed({"weight_map": ["a"]}), "index.json has no weight_map"),
    "index with a number": (indexed({"weight_map": {"a": 5}}), "says that a is in '5'"),
    "index to above": (indexed({"weight_map": {"a": "../x.safetensors"}}), "is in '../x.safetensors'"),
    "index to elsewhere": (indexed({"weight_map": {"a": "/x/x.safetensors"}}), "is in '/x/x.safetensors'"),
    "index to a pickle": (indexed({"weight_map": {"a": "pytorch_model.bin"}}), "is in 'pytorch_model.bin'"),
    "index to nothing": (indexed({"weight_map": {"a": "gone.safetensors"}}), "gone.safetensors is missing"),
    # weights
    "cut": (weights(lambda content: content[:-10]), "model.safetensors is damaged"),
    "cut in the header": (weights(lambda content: content[:20]), "model.safetensors is damaged"),
    "empty": (weights(lambda content: b""), "model.safetensors is damaged"),
    "long header": (weights(lambda content: struct.pack("<Q", 2**62) + content[8:]), "model.safetensors is damaged"),
    "noise": (weights(lambda content: bytes(range(256)) * 4), "model.safetensors is damaged"),
    "no tensors": (weights(lambda content: struct.pack("<Q", 2) + b"{}"), "num_hidden_layers=3|without a tensor"),
    "offsets": (header(data_offsets=[0, 10**12]), "model.safetensors is damaged"),
    "negative offsets": (header(data_offsets=[-5, 10]), "model.safetensors is damaged"),
    "reversed offsets": (header(data_offsets=[10, 5]), "model.safetensors is damaged"),
    "shape": (header(shape=[2**40, 2**40]), "model.safetensors is damaged"),
    "type": (header(dtype="X9"), "model.safetensors is damaged"),
    "pipe": (pipe(WEIGHTS), "model.safetensors is missing"),
    "adapter": (
        replaced("adapter_config.json", '{"base_model_name_or_path": "/x"}'),
        "adapter_config.json, which names",
    ),
    "gone": (lambda directory: (directory / WEIGHTS).unlink(), "has no weights"),
    "pickle of torch": (pickled("torch"), "pytorch_model.bin, a pickle.*save_pretrained"),
    "plain pickle": (pickled("plain"), "pytorch_model.bin, a pickle"),
    "harmless pickle": (pickled("harmless"), "pytorch_model.bin, a pickle"),
}
#: what import reads otherwise than generate, or does not read
NOT_FOR_IMPORT = ("type of weights",)
CURE = re.compile(r"correct|copy|export|give|leave|remove|where you trust it|nothing is dropped|update")


#: of the bundled class alone
BAD_COPIES = {
    "copies": (edited(CONFIG, phd_repeat=2**70), "phd_repeat=1180591620717411303424: .* at least 1 and at most 1024"),
    "many copies": (edited(CONFIG, phd_repeat=10**9), "phd_repeat=1000000000: .* at most 1024"),
    "window": (edited(CONFIG, phd_window=2**70), "phd_window=1180591620717411303424: .* at most"),
    "chunk": (edited(CONFIG, phd_chunk=2**70), "phd_chunk=1180591620717411303424: .* at most"),
    "no chunk": (edited(CONFIG, phd_chunk=0), "phd_chunk=0: .* at least 1"),
    "groups of experts": (edited(CONFIG, n_group=2**70), "n_group=1180591620717411303424: .* at most 2147483647"),
}


@pytest.mark.parametrize("native", [True, False], ids=["native", "bundled"])
def test_each_ends_in_one_message(make_checkpoint, tmp_path, capfd, monkeypatch, native):
    """One export for all, since making it takes longer than refusing a copy of it."""
    # transformers keeps the stream of the test that imported it, and logging would print that it is closed
    monkeypatch.setattr("logging.raiseExceptions", False)
    export_checkpoint(make_checkpoint(**({} if native else PHD)), tmp_path / "hf", verify="none")
    problems = []
    for name, (damage, wanted) in {**BAD, **({} if native else BAD_COPIES)}.items():
        directory = shutil.copytree(tmp_path / "hf", tmp_path / "case" / "hf")
        damage(directory)
        commands = {"generate": ["generate", "--checkpoint", str(directory), "--prompt", "x", "--max-new-tokens", "2"]}
        if name not in NOT_FOR_IMPORT:
            commands["import"] = ["import", "--hf-dir", str(directory), "--output", str(tmp_path / "case" / "save")]
        for command, words in commands.items():
            capfd.readouterr()
            began = time.process_time()
            try:
                code = main(words)
            except Exception as error:  # a traceback for the user
                problems.append(f"{name}, {command}: {type(error).__name__}: {error}")
                continue
            took = time.process_time() - began  # of the processor's time, which no other program takes from it
            said = " ".join(capfd.readouterr().err.split())
            ok = code == 2 and said.count("error: ") >= 1 and re.search(wanted, said) and CURE.search(said)
            if not ok or "Traceback" in said or took > 60:
                problems.append(f"{name}, {command}: {code} after {took:.1f} s of the processor: {said[-400:]}")
            if (tmp_path / "case" / "save").exists() or (tmp_path / "case" / "it-ran").exists():
                problems.append(f"{name}, {command}: left something, or ran it")
        shutil.rmtree(tmp_path / "case")
    assert not problems, "\n".join(problems)


OPTIONS = {
    "tiny temperature": (["--temperature", "1e-320"], "temperature=1e-320: it must be at least 1e-6"),
    "no temperature": (["--temperature", "0"], "temperature=0.0"),
    "negative temperature": (["--temperature", "-1"], "temperature=-1.0"),
    "infinite temperature": (["--temperature", "inf"], "--temperature inf: it is not finite"),
    "temperature that is none": (["--temperature", "nan"], "--temperature nan: it is not finite"),
    "top_k 0": (["--top-k", "0"], "top_k=0"),
    "huge top_k": (["--top-k", "9" * 30], "--top-k 9999.* use a smaller number"),
    "top_p 0": (["--top-p", "0"], "top_p=0.0"),
    "top_p 2": (["--top-p", "2"], "top_p=2.0"),
    "top_p nan": (["--top-p", "nan"], "--top-p nan: it is not finite"),
    "no tokens": (["--max-new-tokens", "0"], "max_new_tokens=0"),
    "negative tokens": (["--max-new-tokens", "-3"], "max_new_tokens=-3"),
    "a billion tokens": (["--max-new-tokens", "1000000000"], "max_new_tokens=1000000000: .* at most 1,000,000"),
    "a huge number of tokens": (["--max-new-tokens", "9" * 30], "--max-new-tokens 9999.* use a smaller number"),
    "huge seed": (["--temperature", "1", "--seed", str(2**63)], "--seed 9223372036854775808.* use a smaller number"),
    "hugely negative seed": (["--seed", str(-(2**63) - 1)], "--seed -9223372036854775809.* use a"),
    "no prompt": (["--prompt", ""], "prompt .*(has no tokens|is empty)"),
    "prompt of bytes": (["--prompt", "\udcff"], "is no valid UTF-8; give it as text"),
}


def test_options_that_cannot_be(make_checkpoint, tmp_path, capsys):
    export_checkpoint(make_checkpoint(), tmp_path / "hf", verify="none")
    wrong = dict(OPTIONS)
    if not torch.cuda.is_available():
        wrong["no GPU"] = (["--device", "cuda"], "--device cuda, but torch .* sees no CUDA device: .*use --device cpu")
    for name, (words, message) in wrong.items():
        assert main(["generate", "--checkpoint", str(tmp_path / "hf"), "--prompt", "x", *words]) == 2, name
        said = capsys.readouterr().err
        assert re.search(message, said), (name, said)
    fine = ["--temperature", "1e-6", "--top-k", "1000", "--top-p", "1e-300", "--seed", "-1", "--max-new-tokens", "2"]
    assert main(["generate", "--checkpoint", str(tmp_path / "hf"), "--prompt", "x", *fine]) == 0


def test_what_needs_no_model_is_refused_before_one_is_loaded(make_checkpoint, tmp_path, capsys):
    """The weights are gone, so a message about anything else was there before they were looked for."""
    save = make_checkpoint()
    export_checkpoint(save, tmp_path / "hf", verify="none")
    (tmp_path / "hf" / "model.safetensors").unlink()
    file = next(save.glob("iter_*/*.distcp"))
    checksums.write_manifest(file.parent, {}, {})
    file.unlink()
    (tmp_path / "text.txt").write_text("some words " * 200)
    data = str(tmp_path / "data")
    assert main(["prepare", "--input", str(tmp_path / "text.txt"), "--output-prefix", data, "--no-progress"]) == 0
    generate = ["generate", "--checkpoint", str(tmp_path / "hf")]
    evaluate = ["evaluate", "--checkpoint", str(tmp_path / "hf"), "--device", "cpu", "--data-path", data]
    export = ["export", "--checkpoint", str(save), "--output", str(tmp_path / "other")]
    for words, message in (
        ([*generate, "--prompt", "x"], "model.safetensors"),
        ([*generate, "--prompt", "\udcff"], "is no valid UTF-8"),
        (evaluate, "model.safetensors"),
        ([*evaluate, "--num-samples", "0"], "--num-samples 0: give at least 1"),
        ([*evaluate, "--split", "a"], "--split 'a' is not up to three shares"),
        ([*evaluate, "--split", "1,0,0", "--subset", "test"], "gives the test split nothing"),
        ([*evaluate[:-1], f"{data}-none"], f"{data}-none"),
        (export, ".distcp is missing"),
        ([*export, "--dtype", "int8"], "dtype='int8' is not known"),
    ):
        capsys.readouterr()
        assert main(words) == 2, words
        said = capsys.readouterr().err
        assert message in said, (words, said)


def test_a_model_of_nan_does_not_continue(make_checkpoint, tmp_path, capsys):
    export_checkpoint(make_checkpoint(), tmp_path / "hf", verify="none")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, path, metadata={"format": "pt"})
    for words in ([], ["--temperature", "0.7"]):
        assert main(["generate", "--checkpoint", str(tmp_path / "hf"), "--prompt", "x", *words]) == 2
        assert "the model's logits are NaN" in capsys.readouterr().err


def test_a_tokenizer_with_more_tokens_than_the_model(make_checkpoint, tmp_path, capsys):
    export_checkpoint(make_checkpoint(vocab_size=100, tokenizer=False), tmp_path / "hf", verify="none")
    export_checkpoint(make_checkpoint("other"), tmp_path / "words", verify="none")
    for name in ("tokenizer.json", TOKENIZER):
        shutil.copyfile(tmp_path / "words" / name, tmp_path / "hf" / name)
    assert main(["generate", "--checkpoint", str(tmp_path / "hf"), "--prompt", "x"]) == 2
    assert "the tokenizer gives token 120, and the model has a vocabulary of 100" in capsys.readouterr().err


def test_a_pickle_beside_safetensors_is_not_read(make_checkpoint, tmp_path):
    export_checkpoint(make_checkpoint(), tmp_path / "hf", verify="none")
    torch.save({"model.norm.weight": Leaves(tmp_path / "it-ran")}, tmp_path / "hf" / "pytorch_model.bin")
    assert main(["generate", "--checkpoint", str(tmp_path / "hf"), "--prompt", "x", "--max-new-tokens", "1"]) == 0
    assert not (tmp_path / "it-ran").exists()


NUMBERS = {
    "--upcycle-experts 1000000000": "--upcycle-experts 1000000000: use a number from 1 to 16,384",
    "--upcycle-experts 2 --moe-router-topk 0": "--moe-router-topk 0: use a number from 1",
    "--make-vocab-size-divisible-by 1000000000000": "--make-vocab-size-divisible-by 1000000000000: use a number",
    "--seq-length 1000000000000": "--seq-length 1000000000000: ",
    "--phd-repeat 1000000000": "--phd-repeat 1000000000: use a number",
    "--phd-repeat 0": "",
}


def test_numbers_of_import_and_export(make_checkpoint, tmp_path, capsys):
    save = make_checkpoint()
    export_checkpoint(save, tmp_path / "hf", verify="none")
    words = ["import", "--hf-dir", str(tmp_path / "hf"), "--output", str(tmp_path / "save"), "--verify", "none"]
    for options, message in NUMBERS.items():
        assert main([*words, *options.split()]) == 2, options
        assert message in capsys.readouterr().err and not (tmp_path / "save").exists()
    for size in ("9" * 400, "0.0000001B", "nan", "0"):
        words = ["export", "--checkpoint", str(save), "--output", str(tmp_path / "other"), "--max-shard-size", size]
        assert main(words) == 2, size
        said = capsys.readouterr().err
        assert f"max_shard_size={size[:80]!r}"[:-1] in said and "is no size; write a number" in said


def test_odd_models_are_generated_from_and_evaluated(tmp_path, capsys):
    """Families without Llama's words: GPT-2, and Mamba, which has no positions."""
    import transformers

    from phd_megatron.data.tokenizers import load_tokenizer

    (tmp_path / "text.txt").write_text("some words of a text " * 50)
    words = ["prepare", "--input", str(tmp_path / "text.txt"), "--output-prefix", str(tmp_path / "data")]
    assert main([*words, "--workers", "1"]) == 0
    for family, sizes in {
        "GPT2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64},
        "Mamba": {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
    }.items():
        config = getattr(transformers, f"{family}Config")(
            vocab_size=257, bos_token_id=None, eos_token_id=256, pad_token_id=256, **sizes
        )
        directory = tmp_path / family
        (getattr(transformers, f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"))(
            config
        ).save_pretrained(directory)
        load_tokenizer("byte").save(directory)
        generate = ["generate", "--checkpoint", str(directory), "--prompt", "x", "--max-new-tokens", "2"]
        assert main(generate) == 0
        assert ("KV cache per layer" in capsys.readouterr().out) == (family == "GPT2")
        evaluate = [
            "evaluate",
            "--checkpoint",
            str(directory),
            "--data-path",
            str(tmp_path / "data"),
            "--device",
            "cpu",
        ]
        if family == "Mamba":
            assert main(evaluate) == 2
            assert "how many positions its model was trained on; say --seq-length N" in capsys.readouterr().err
        assert main([*evaluate, "--seq-length", "16", "--num-samples", "2"]) == 0


def test_a_size_for_each_layer_is_looked_at_one_by_one(tmp_path):
    """As Gemma 3n has them."""
    places = {"w": Place(tmp_path / "w", (2048, 2048), "F32")}
    check_config(tmp_path / "config.json", {"text_config": {"intermediate_size": [64, 128]}}, places)
    for bad in ([64, 0], [64, 10**9], ["64"], []):
        with pytest.raises(UserError, match=r"intermediate_size=.*correct it"):
            check_config(tmp_path / "config.json", {"intermediate_size": bad}, places)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("training_state.json", "training_state.json cannot be read"),
        ("tokenizer/tokenizer_config.json", "tokenizer_config.json cannot be read"),
    ],
)
def test_deep_json_in_a_checkpoint_without_checksums(make_checkpoint, tmp_path, capsys, name, said):
    save = make_checkpoint()
    next(save.glob(f"iter_*/{name}")).write_text('{"a": ' * 100_000)
    assert main(["export", "--checkpoint", str(save), "--output", str(tmp_path / "hf"), "--verify", "none"]) == 2
    error = capsys.readouterr().err
    assert said in error and "copy the" in error and not (tmp_path / "hf").exists()


def test_odd_special_tokens_are_none(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    for added in ([1, {}, {"content": "<s>"}, {"content": "<s>", "id": "x"}], 5, {"content": "<s>"}):
        (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
        assert _bos(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"content": "<s>", "id": 7}]}))
    assert _bos(tmp_path) == 7
