"""Python files that a directory brings do not run in our commands, wherever they lie in it."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from phd_megatron.cli.main import main
from phd_megatron.data.bpe import train_bpe
from phd_megatron.huggingface.export import export_checkpoint

PHD = {"norm_scheme": "hybrid_star", "phd_repeat": 2, "phd_window": 4, "phd_chunk": 8}


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def plant(directory, where, marker):
    """Code that leaves ``marker`` behind when it runs."""
    code = f"open({str(marker)!r}, 'w').close()\n"
    if where == "tokenizer auto_map":
        change_json(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]})
    if where == "subfolder":
        change_json(directory / "config.json", auto_map={"AutoModelForCausalLM": "inside.own.Own"})
    if where == "another repository":
        change_json(directory / "config.json", auto_map={"AutoModelForCausalLM": "some/body--own.Own"})
        change_json(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": ["some/body--own.Own", None]})
        (directory / "some" / "body").mkdir(parents=True)
    if where == "slow tokenizer":
        (directory / "tokenizer.json").unlink()
        change_json(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]})
    names = {
        "another repository": ["some/body/own.py", "own.py"],
        "slow tokenizer": ["own.py"],
        "bundled names": [path.name for path in directory.glob("*.py")],
        "custom_generate": ["custom_generate/generate.py"],
        "tokenizer auto_map": ["own.py"],
        "subfolder": ["inside/own.py", "inside/__init__.py"],
    }
    for name in names[where]:
        (directory / name).parent.mkdir(exist_ok=True, parents=True)
        (directory / name).write_text(code + "def generate(model, **options):\n    pass\n")


@pytest.mark.parametrize(
    "where",
    ["bundled names", "custom_generate", "tokenizer auto_map", "subfolder", "another repository", "slow tokenizer"],
)
@pytest.mark.parametrize("native", [True, False], ids=["native", "bundled"])
def test_a_directorys_own_code_does_not_run(make_checkpoint, tmp_path, capsys, caplog, where, native):
    source = make_checkpoint(**({} if native else PHD))
    export_checkpoint(source, tmp_path / "hf", verify="none")
    expected = ["generate", "--prompt", "def main", "--max-new-tokens", "4", "--checkpoint"]
    assert main([*expected, str(tmp_path / "hf")]) == 0
    text = capsys.readouterr().out.split("\n\n")[0]
    changed, marker = shutil.copytree(tmp_path / "hf", tmp_path / "changed"), tmp_path / "it-ran"
    plant(changed, where, marker)
    ended = main([*expected, str(changed)])
    assert not marker.exists()
    # What needs the planted code is refused; else the result is that of the code that is installed.
    assert ended == 2 or capsys.readouterr().out.split("\n\n")[0] == text
    assert (ended == 2) <= (where != "bundled names")
    verify = "full" if where == "custom_generate" else "none"  # a process of its own, so once
    ended = main(["import", "--hf-dir", str(changed), "--output", str(tmp_path / "save"), "--verify", verify])
    assert not marker.exists() and ended in (0, 2)
    (tmp_path / "text.txt").write_text("some words of a text " * 50)
    prepare = ["prepare", "--input", str(tmp_path / "text.txt"), "--output-prefix", str(tmp_path / "data")]
    ended = main([*prepare, "--workers", "1", "--tokenizer", str(changed)])
    assert not marker.exists() and ended == (2 if where == "slow tokenizer" else 0)
    settings = tmp_path / "data.tokenizer" / "tokenizer_config.json"
    assert ended or "auto_map" not in json.loads(settings.read_text())
    ended = main(
        ["evaluate", "--checkpoint", str(changed), "--data-path", str(tmp_path / "data"), "--num-samples", "1"]
    )
    assert not marker.exists() and ended in (0, 2)
    if where == "bundled names" and not native:
        assert "brings Python files that are not this release's" in caplog.text


def test_a_model_of_an_unknown_type_needs_consent(make_checkpoint, tmp_path, capsys):
    export_checkpoint(make_checkpoint(), tmp_path / "hf", verify="none")
    change_json(
        tmp_path / "hf" / "config.json",
        model_type="of_its_own",
        auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    )
    (tmp_path / "hf" / "own.py").write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w').close()\n")
    assert main(["generate", "--checkpoint", str(tmp_path / "hf"), "--prompt", "x"]) == 2
    said = capsys.readouterr().err
    assert "cannot be loaded" in said and "give --trust-remote-code" in said and not (tmp_path / "it-ran").exists()


def test_an_export_takes_nothing_but_tokenizer_files_from_a_checkpoint(make_checkpoint, tmp_path):
    save, marker = make_checkpoint(**PHD), tmp_path / "it-ran"
    expected = export_checkpoint(save, tmp_path / "expected", verify="none").output
    (tokenizer,) = save.glob("iter_*/tokenizer")
    for name in ("modeling_phd.py", "kv_policy.py", "own.py"):
        (tokenizer / name).write_text(f"open({str(marker)!r}, 'w').close()\n")
    (tokenizer / "config.json").write_text(json.dumps({"auto_map": {"AutoModelForCausalLM": "own.Own"}}))
    (tokenizer / "model.safetensors").write_bytes(b"")
    found = export_checkpoint(save, tmp_path / "hf", verify="tensors").output
    assert not marker.exists()
    assert {path.name for path in found.iterdir()} == {path.name for path in expected.iterdir()}
    for path in expected.glob("*.py"):
        assert (found / path.name).read_bytes() == path.read_bytes()
    assert load_file(found / "model.safetensors").keys() == load_file(expected / "model.safetensors").keys()


def test_options_of_a_later_release_are_refused(make_checkpoint, tmp_path, capsys):
    export_checkpoint(make_checkpoint(**PHD), tmp_path / "hf", verify="none")
    change_json(tmp_path / "hf" / "config.json", phd_copy_gate="sigmoid")
    assert main(["generate", "--checkpoint", str(tmp_path / "hf"), "--prompt", "x"]) == 2
    assert "has phd_copy_gate, which this release does not know" in capsys.readouterr().err


def test_a_checkpoints_tokenizer_brings_no_code(make_checkpoint, tmp_path, capsys):
    """Also where transformers has to look for its class, and in the export that is made of it."""
    save, marker = make_checkpoint(**PHD), tmp_path / "it-ran"
    (tokenizer,) = save.glob("iter_*/tokenizer")
    for where in ("tokenizer auto_map", "another repository"):
        plant(tokenizer, where, marker) if where == "tokenizer auto_map" else change_json(
            tokenizer / "tokenizer_config.json", auto_map={"AutoTokenizer": ["some/body--own.Own", None]}
        )
        shutil.rmtree(tmp_path / "hf", ignore_errors=True)
        assert main(["export", "--checkpoint", str(save), "--output", str(tmp_path / "hf")]) == 0
        assert "auto_map" not in json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
        assert main(["generate", "--checkpoint", str(save), "--prompt", "x", "--max-new-tokens", "2"]) == 0
        assert not marker.exists()
    (tokenizer / "tokenizer.json").unlink()
    (tokenizer / "vocab.json").write_text("{}")
    for words in (
        ["export", "--checkpoint", str(save), "--output", str(tmp_path / "other")],
        ["generate", "--checkpoint", str(save), "--prompt", "x"],
    ):
        assert main(words) == 2
        assert "Traceback" not in capsys.readouterr().err and not marker.exists()


def test_links_of_a_checkpoints_tokenizer_bring_no_file_of_this_machine(make_checkpoint, tmp_path, capsys):
    """It comes with the checkpoint, so nobody has named it."""
    save, secret = make_checkpoint(), tmp_path / "secret"
    secret.write_text("of this machine")
    (tokenizer,) = save.glob("iter_*/tokenizer")
    (tmp_path / "text.txt").write_text("some words of a text " * 50)
    words = ["prepare", "--input", str(tmp_path / "text.txt"), "--output-prefix", str(tmp_path / "data")]
    assert main([*words, "--workers", "1"]) == 0
    commands = (
        ["export", "--checkpoint", str(save), "--output", str(tmp_path / "hf"), "--verify", "none"],
        ["generate", "--checkpoint", str(save), "--prompt", "x"],
        ["evaluate", "--checkpoint", str(save), "--data-path", str(tmp_path / "data"), "--device", "cpu"],
    )
    for name in ("merges.txt", "tokenizer.json"):
        kept = (tokenizer / name).rename(tmp_path / "kept") if (tokenizer / name).exists() else None
        (tokenizer / name).symlink_to(secret)
        for command in commands:
            capsys.readouterr()
            assert main(command) == 2, command
            said = capsys.readouterr().err
            assert f"{name} is a link to {secret}, outside the checkpoint" in said and "put a copy" in said, said
        (tokenizer / name).unlink()
        if kept:
            kept.rename(tokenizer / name)
    shutil.move(tokenizer, tmp_path / "moved")
    tokenizer.symlink_to(tmp_path / "moved")
    assert main(commands[0]) == 2 and "tokenizer is a link to" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_links_of_a_directory_that_is_named_are_followed(make_checkpoint, tmp_path, capsys, workers):
    """As those of the hub's cache are; what is no file is refused by name."""
    (tmp_path / "text.txt").write_text("some words")
    library = write_bpe(tmp_path / "bpe")
    prepare = ["prepare", "--input", str(tmp_path / "text.txt"), "--workers", workers, "--output-prefix"]
    (tmp_path / "linked").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "linked" / name).symlink_to(library / name)
    assert main([*prepare, str(tmp_path / "data"), "--tokenizer", str(tmp_path / "linked")]) == 0
    copied = tmp_path / "data.tokenizer" / "tokenizer.json"
    assert not copied.is_symlink() and copied.read_bytes() == (library / "tokenizer.json").read_bytes()
    if workers == "1":
        export_checkpoint(make_checkpoint(), tmp_path / "hf", verify="none")
        shutil.move(tmp_path / "hf" / "tokenizer.json", tmp_path / "elsewhere.json")
        (tmp_path / "hf" / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
        words = ["import", "--hf-dir", str(tmp_path / "hf"), "--output", str(tmp_path / "save"), "--verify", "none"]
        assert main(words) == 0
        assert list(tmp_path.glob("save/iter_*/tokenizer/tokenizer.json"))
    for make, what in (
        (lambda path: path.symlink_to(tmp_path / "gone"), "a link to"),
        (lambda path: os.mkfifo(path), "a pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
        (lambda path: path.mkdir(), "a directory"),
    ):
        directory = shutil.copytree(library, tmp_path / "odd")
        make(directory / "merges.txt")
        assert main([*prepare, str(tmp_path / "other"), "--tokenizer", str(directory)]) == 2
        said = capsys.readouterr().err
        assert "merges.txt" in said and what in said and "put the file in its place" in said, said
        shutil.rmtree(directory)
    if workers == "2":
        return

    hub = tmp_path / "models--some--body"
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots" / "0123").mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.move(library / name, hub / "blobs" / name)
        (hub / "snapshots" / "0123" / name).symlink_to(f"../../blobs/{name}")
    assert main([*prepare, str(tmp_path / "cached"), "--tokenizer", str(hub / "snapshots" / "0123")]) == 0
    assert (tmp_path / "cached.tokenizer" / "tokenizer.json").is_file()


def write_bpe(directory):
    train_bpe([["some words to be cut into tokens"]], 300, 1, directory)
    return directory


class Leaves:
    """A pickle that makes a directory when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_of_a_checkpoint_run_nothing(make_checkpoint, tmp_path, capsys):
    marker = tmp_path / "it-ran"
    export_checkpoint(make_checkpoint(), tmp_path / "hf", verify="none")
    save = tmp_path / "save"
    assert main(["import", "--hf-dir", str(tmp_path / "hf"), "--output", str(save), "--verify", "none"]) == 0
    (iteration,) = save.glob("iter_*")
    (tmp_path / "text.txt").write_text("some words of a text " * 500)
    prepare = ["prepare", "--input", str(tmp_path / "text.txt"), "--output-prefix", str(tmp_path / "data")]
    assert main([*prepare, "--workers", "1"]) == 0
    train = ["pretrain", "--load", str(save), "--finetune", "--data-path", str(tmp_path / "data"), "--device", "cpu"]
    train += ["--train-iters", "1", "--micro-batch-size", "1", "--global-batch-size", "1", "--eval-iters", "0"]
    readers = {
        ".metadata": (
            pickle.dumps(Leaves(marker)),
            ["export", "--checkpoint", str(save), "--output", str(tmp_path / "x")],
        ),
        "common.pt": (saved(Leaves(marker)), train),
        "run_config.yaml": (
            f"!!python/object/apply:os.mkdir ['{marker}']\n".encode(),
            ["generate", "--checkpoint", str(save), "--prompt", "x"],
        ),
    }
    for name, (bad, words) in readers.items():
        good = (iteration / name).read_bytes()
        (iteration / name).write_bytes(bad)
        done = subprocess.run(
            [sys.executable, "-m", "phd_megatron", *words, "--no-verify-checkpoint"],
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert not marker.exists(), name
        assert done.returncode == 2 and name in done.stderr and "Traceback" not in done.stderr, done.stderr
        (iteration / name).write_bytes(good)


def saved(content):
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()
