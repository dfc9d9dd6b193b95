"""A damaged exported directory is an error that names what is wrong, in `generate` and in `evaluate`."""

from __future__ import annotations

import json

import pytest

from phd_megatron.cli.main import main
from phd_megatron.huggingface.export import export_checkpoint


def edit(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(directory):
    path = sorted(directory.glob("model-*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {
    "truncated": (cut, "model-00001-of-"),
    "missing shard": (lambda d: sorted(d.glob("model-*.safetensors"))[1].unlink(), "model-00002-of-"),
    "hidden size": (lambda d: edit(d, hidden_size=48), "its config.json says another shape for"),
    "fewer layers": (lambda d: edit(d, num_hidden_layers=2), "its config.json has no place for model.layers.2."),
    "more layers": (lambda d: edit(d, num_hidden_layers=4), "it lacks model.layers.3."),
    "scheme": (lambda d: edit(d, norm_scheme="nonsense"), "norm_scheme='nonsense'"),
    "policy": (lambda d: edit(d, phd_window=0), "phd_window=0"),
    "tokenizer": (lambda d: [path.unlink() for path in d.glob("tokenizer*")], "tokenizer"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(make_checkpoint, tmp_path, capsys, what):
    fields = {"norm_scheme": "hybrid_star", "phd_repeat": 2, "phd_window": 16, "phd_chunk": 32}
    export_checkpoint(make_checkpoint(**fields), tmp_path / "hf", verify="none", max_shard_size="8KB")
    damage, message = DAMAGE[what]
    damage(tmp_path / "hf")
    assert main(["generate", "--checkpoint", str(tmp_path / "hf"), "--prompt", "x", "--max-new-tokens", "1"]) == 2
    error = capsys.readouterr().err
    assert "error: " in error and message in error
    if what != "tokenizer":
        (tmp_path / "text.txt").write_text("some words to evaluate on\n" * 90)
        assert main(["prepare", "--input", str(tmp_path / "text.txt"), "--output-prefix", str(tmp_path / "data")]) == 0
        assert main(["evaluate", "--checkpoint", str(tmp_path / "hf"), "--data-path", str(tmp_path / "data")]) == 2
        assert message in capsys.readouterr().err


def test_a_checkpoint_without_one_of_its_files(make_checkpoint, tmp_path, capsys):
    source = make_checkpoint()
    missing = next(source.glob("iter_*/*.distcp"))
    missing.unlink()
    assert main(["export", "--checkpoint", str(source), "--output", str(tmp_path / "hf")]) == 2
    assert missing.name in capsys.readouterr().err
    assert not [path.name for path in tmp_path.iterdir() if "hf" in path.name]
