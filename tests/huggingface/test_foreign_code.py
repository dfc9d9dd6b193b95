"""Python files that a directory brings do not run in our commands, wherever they lie in it."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file

from phd_megatron.cli.main import main
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
    names = {
        "bundled names": [path.name for path in directory.glob("*.py")],
        "custom_generate": ["custom_generate/generate.py"],
        "tokenizer auto_map": ["own.py"],
        "subfolder": ["inside/own.py", "inside/__init__.py"],
    }
    for name in names[where]:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(code + "def generate(model, **options):\n    pass\n")


@pytest.mark.parametrize("where", ["bundled names", "custom_generate", "tokenizer auto_map", "subfolder"])
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
    ended = main(["import", "--hf-dir", str(changed), "--output", str(tmp_path / "save"), "--verify", "full"])
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
    (tmp_path / "secret").write_text("of this machine")
    (tokenizer / "merges.txt").symlink_to(tmp_path / "secret")
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
