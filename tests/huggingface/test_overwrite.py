"""`export --overwrite` replaces exports of ours, `import` nothing; whatever else stands at --output stays as it is."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from phd_megatron.cli.main import main
from phd_megatron.huggingface.export import export_checkpoint
from phd_megatron.runtime import output as outputs


def snapshot(root):
    """Every path below ``root``, links not followed, with what it holds."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        elif path.is_dir():
            found[name] = ("directory", path.stat().st_ino)
        else:
            found[name] = ("file", path.read_bytes())
    return found


def documents(root):
    (root / "place").mkdir()
    (root / "place" / "thesis.txt").write_text("years of work")
    return root / "place", "thesis.txt in it is not an export's"


def of_a_name(name, said):
    """The run itself, or something about it."""
    return lambda root: (root / name, said)


def a_file(root):
    (root / "place").write_text("of somebody")
    return root / "place", "is a file, not a directory"


def a_link(root):
    shutil.copytree(root / "hf", root / "elsewhere")
    (root / "place").symlink_to("elsewhere")
    return root / "place", "is a link to elsewhere"


def a_dangling_link(root):
    (root / "place").symlink_to("nowhere")
    return root / "place", "is a link to nowhere"


def changed(change, said):
    """An export of ours, and something in it that no export wrote."""

    def make(root):
        shutil.copytree(root / "hf", root / "place")
        change(root / "place")
        return root / "place", said

    return make


def foreign(directory):
    """A model that is not ours under the names of one."""
    content = json.loads((directory / "config.json").read_text())
    for name in ("norm_scheme", "phd_repeat"):
        del content[name]
    (directory / "config.json").write_text(json.dumps(content))


NOT_REPLACED = {
    "the run": of_a_name("run", "iter_0000100 in it is no file"),
    "its iteration": of_a_name("run/iter_0000100", "in it is"),
    "its tokenizer": of_a_name("run/iter_0000100/tokenizer", "it has no config.json|in a checkpoint's directory"),
    "above it": of_a_name(".", "hf in it is no file"),
    "inside an iteration": of_a_name("run/iter_0000100/hf", "in a checkpoint's directory"),
    "documents": documents,
    "a file": a_file,
    "a link": a_link,
    "a link to nothing": a_dangling_link,
    "notes in an export": changed(lambda d: (d / "notes.txt").write_text("x"), "notes.txt in it is not an export's"),
    "own code in an export": changed(lambda d: (d / "my_phd.py").write_text("x"), "my_phd.py in it is not an export's"),
    "checkpoints in an export": changed(lambda d: (d / "checkpoint-500").mkdir(), "checkpoint-500 in it is no file"),
    "a link in an export": changed(lambda d: (d / "link").symlink_to("/etc"), "link in it is no file"),
    "a repository": changed(lambda d: (d / ".git").mkdir(), ".git in it is no file"),
    "a model of others": changed(foreign, "do not say that phd-megatron exported it"),
    "a card of others": changed(lambda d: (d / "README.md").write_text("# Mine\n"), "do not say that phd-megatron"),
    "no card": changed(lambda d: (d / "README.md").unlink(), "it has no README.md"),
    "damaged configuration": changed(lambda d: (d / "config.json").write_text("{"), "cannot be read"),
    "nothing named": lambda root: ("", "is empty"),
    "the root": lambda root: ("/", "is the root of the file system|in it is no file|cannot"),
}


def test_what_is_no_export_stays(make_checkpoint, tmp_path, capsys, monkeypatch):
    save = make_checkpoint()
    export_checkpoint(save, tmp_path / "hf", verify="none")
    for name, make in NOT_REPLACED.items():
        place, said = make(tmp_path)
        before = snapshot(tmp_path)
        for source in (save, save / "iter_0000100"):
            words = ["export", "--checkpoint", str(source), "--output", str(place), "--verify", "none"]
            assert main([*words, "--overwrite"]) == 2, name
            error = capsys.readouterr().err
            assert re.search(said, error) and "Traceback" not in error, f"{name}: {error}"
            assert re.search("choose another|name the directory itself|give a value", error), f"{name}: {error}"
            assert main(words) == 2, name
            assert "replace it with --overwrite" not in capsys.readouterr().err, name
            assert snapshot(tmp_path) == before, name
        for left in ("place", "elsewhere"):
            path = tmp_path / left
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def test_exports_of_ours_are_replaced(make_checkpoint, tmp_path, monkeypatch):
    """Of every kind, through a link to its parent, and where two names cannot be swapped."""
    kinds = {"plain": {}, "phd": {"norm_scheme": "hybrid_star", "phd_repeat": 2, "phd_window": 4, "phd_chunk": 8}}
    saves = {name: make_checkpoint(name, **fields) for name, fields in kinds.items()}
    (tmp_path / "link").symlink_to(tmp_path)
    for before in saves.values():
        for after in saves.values():
            export_checkpoint(before, tmp_path / "hf", verify="none", max_shard_size="8KB", overwrite=True)
            report = export_checkpoint(after, tmp_path / "link" / "hf", verify="none", overwrite=True)
            config = json.loads((tmp_path / "hf" / "config.json").read_text())
            assert config["architectures"] == [report.model_class]
            assert len(list((tmp_path / "hf").glob("*.safetensors"))) == 1
    monkeypatch.setattr(outputs, "_exchange", lambda one, other: False)  # as on a file system that cannot
    export_checkpoint(saves["plain"], tmp_path / "hf", verify="none", overwrite=True)
    assert not list(tmp_path.glob(".hf*"))
    (tmp_path / "empty").mkdir()
    export_checkpoint(saves["plain"], tmp_path / "empty", verify="none")
    assert (tmp_path / "empty" / "config.json").is_file()


KILLED = """
import os, sys
from phd_megatron.huggingface import export
from phd_megatron.huggingface.export import export_checkpoint

def die(*arguments):
    os._exit(9)

export.model_card = die
export_checkpoint(sys.argv[1], sys.argv[2], overwrite=True, verify="none")
"""


def test_a_kill_leaves_the_old_export(make_checkpoint, tmp_path):
    export_checkpoint(make_checkpoint(), tmp_path / "hf", verify="none")
    before = snapshot(tmp_path / "hf")
    words = [sys.executable, "-c", KILLED, str(make_checkpoint("other", seed=1)), str(tmp_path / "hf")]
    assert subprocess.run(words, timeout=400).returncode == 9
    assert snapshot(tmp_path / "hf") == before


@pytest.mark.parametrize("make", [documents, a_file, a_link, a_dangling_link], ids=lambda make: make.__name__)
def test_import_replaces_nothing(make_checkpoint, tmp_path, capsys, make):
    export_checkpoint(make_checkpoint(), tmp_path / "hf", verify="none")
    place, _ = make(tmp_path)
    before = snapshot(tmp_path)
    assert main(["import", "--hf-dir", str(tmp_path / "hf"), "--output", str(place), "--verify", "none"]) == 2
    assert "choose another --output" in capsys.readouterr().err and snapshot(tmp_path) == before


def test_an_import_that_fails_leaves_an_empty_directory_as_it_was(make_checkpoint, tmp_path, monkeypatch, capsys):
    from phd_megatron.errors import UserError
    from phd_megatron.huggingface import verify

    export_checkpoint(make_checkpoint(), tmp_path / "hf", verify="none")
    (tmp_path / "save").mkdir()
    before = snapshot(tmp_path)

    def differs(*arguments, **options):
        (tmp_path / "save" / "notes.txt").write_text("put there meanwhile")
        raise UserError("it computes something else")

    monkeypatch.setattr(verify, "verify_import", differs)
    assert main(["import", "--hf-dir", str(tmp_path / "hf"), "--output", str(tmp_path / "save")]) == 2
    assert "it computes something else" in capsys.readouterr().err
    (tmp_path / "save" / "notes.txt").unlink()
    assert snapshot(tmp_path) == before
