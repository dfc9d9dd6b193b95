"""Defaults of generation, a list of end tokens among them, come through import, training and export."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from phd_megatron.cli.main import main
from phd_megatron.data.generation import GENERATION_FILE
from phd_megatron.data.preprocess import prepare
from phd_megatron.data.tokenizers import inherit_generation, load_tokenizer
from phd_megatron.huggingface.bundle_files import bundle_files
from phd_megatron.huggingface.export import export_checkpoint

PHD = {"norm_scheme": "hybrid_star", "phd_repeat": 2, "phd_window": 4, "phd_chunk": 8}
DEFAULTS = {
    **{"bos_token_id": 1, "eos_token_id": [256, 10, 13], "pad_token_id": 0, "do_sample": True, "temperature": 0.6},
    **{"top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1, "max_length": 4096, "min_p": 0.05, "num_beams": 1},
    **{"no_repeat_ngram_size": 3, "suppress_tokens": [5, 6], "bad_words_ids": [[7, 8]], "stop_strings": ["###"]},
    **{"length_penalty": -0.5, "early_stopping": "never"},
}


def generation(directory):
    return json.loads((directory / GENERATION_FILE).read_text())


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("fields", [{}, PHD], ids=["native", "bundled"])
def test_they_come_through_import_and_export(make_checkpoint, tmp_path, capsys, fields):
    export_checkpoint(make_checkpoint(**fields), tmp_path / "hf", verify="none")
    others = {"transformers_version": "4.1", "_from_model_config": True, "use_cache": True, "trust": "me"}
    (tmp_path / "hf" / GENERATION_FILE).write_text(json.dumps({**DEFAULTS, **others}))
    edit(tmp_path / "hf" / "config.json", eos_token_id=[256, 10])
    words = ["import", "--hf-dir", str(tmp_path / "hf"), "--output", str(tmp_path / "save"), "--verify", "none"]
    assert main(words) == 0
    assert "generation_config.json: trust left out, as not known here" in capsys.readouterr().out
    (tokenizer,) = tmp_path.glob("save/iter_*/tokenizer")
    assert generation(tokenizer) == DEFAULTS
    sums = json.loads((tokenizer.parent / "checksums.json").read_text())["files"]
    assert f"tokenizer/{GENERATION_FILE}" in sums, "it is a listed file like the others"
    export_checkpoint(tmp_path / "save", tmp_path / "again", verify="tensors")
    assert generation(tmp_path / "again") == DEFAULTS
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, [256, 10, 13], 0]

    from phd_megatron.huggingface.loading import load_directory

    loaded = load_directory(tmp_path / "again", "again").generation_config
    assert loaded.eos_token_id == [256, 10, 13] and loaded.temperature == 0.6 and loaded.repetition_penalty == 1.1
    short = ["generate", "--checkpoint", str(tmp_path / "again"), "--prompt", "def main", "--max-new-tokens", "8"]
    texts = []
    for more in ([], ["--greedy"], ["--top-k", "1"]):  # without a sampling flag greedy, whatever the file says
        assert main([*short, *more]) == 0
        texts.append(capsys.readouterr().out.split("\n\n")[0])
    assert texts[0] == texts[1] == texts[2]


def test_a_list_in_config_json_alone(make_checkpoint, tmp_path):
    export_checkpoint(make_checkpoint(), tmp_path / "hf", verify="none")
    (tmp_path / "hf" / GENERATION_FILE).unlink()
    edit(tmp_path / "hf" / "config.json", eos_token_id=[256, 10])
    words = ["import", "--hf-dir", str(tmp_path / "hf"), "--output", str(tmp_path / "save"), "--verify", "none"]
    assert main(words) == 0
    export_checkpoint(tmp_path / "save", tmp_path / "again", verify="none")
    assert generation(tmp_path / "again")["eos_token_id"] == [256, 10]


def test_they_travel_with_the_tokenizer_through_training(make_checkpoint, tmp_path):
    """prepare takes them along; a run with the same tokenizer but without them takes its checkpoint's."""
    (tmp_path / "tokenizer").mkdir()
    load_tokenizer("byte").save(tmp_path / "tokenizer")
    before = load_tokenizer(tmp_path / "tokenizer").unique_identifiers
    (tmp_path / "tokenizer" / GENERATION_FILE).write_text(json.dumps(DEFAULTS))
    (tmp_path / "text.txt").write_text("some words " * 50)
    prepare([tmp_path / "text.txt"], tmp_path / "data", tokenizer=tmp_path / "tokenizer", progress=False)
    assert generation(tmp_path / "data.tokenizer") == DEFAULTS
    assert load_tokenizer(tmp_path / "data.tokenizer").unique_identifiers == before
    plain = load_tokenizer("byte")
    inherit_generation(plain, tmp_path / "data.tokenizer")
    plain.save(tmp_path / "saved")
    assert generation(tmp_path / "saved") == DEFAULTS
    inherit_generation(plain, tmp_path / "nowhere")
    prepare([tmp_path / "text.txt"], tmp_path / "data", tokenizer=tmp_path / "saved", overwrite=True, progress=False)
    assert generation(tmp_path / "data.tokenizer") == DEFAULTS


def test_tokens_outside_the_vocabulary(make_checkpoint, tmp_path, capsys):
    export_checkpoint(make_checkpoint(), tmp_path / "hf", verify="none")
    edit(tmp_path / "hf" / GENERATION_FILE, eos_token_id=[256, 257])
    words = ["import", "--hf-dir", str(tmp_path / "hf"), "--output", str(tmp_path / "save"), "--verify", "none"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "eos_token_id=[256, 257], and its vocabulary has 257 tokens; correct" in said
    source = make_checkpoint("other")
    (tokenizer,) = source.glob("iter_*/tokenizer")
    (tokenizer / GENERATION_FILE).write_text('{"eos_token_id": 300, "temperature": 0.5, "trust": 1}')
    notes: list[str] = []
    export_checkpoint(source, tmp_path / "again", verify="none", log=notes.append)
    assert any("eos_token_id, trust left out" in note for note in notes)
    assert generation(tmp_path / "again") == {"eos_token_id": 256, "pad_token_id": 256, "temperature": 0.5}


# ---------------------------------------------------------------- other versions of transformers


@pytest.mark.parametrize(
    ("scheme", "kind"), [("pre", "LlamaForCausalLM"), ("pre_qk", "Qwen3ForCausalLM"), ("olmo2", "Olmo2ForCausalLM")]
)
def test_native_exports_say_theta_in_the_words_of_both_versions(make_checkpoint, tmp_path, scheme, kind):
    report = export_checkpoint(make_checkpoint(norm_scheme=scheme, rotary_base=5e5), tmp_path / "hf", verify="full")
    content = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert report.model_class == kind and content["torch_dtype"] == content["dtype"] == "float32"
    assert content["rope_theta"] == 5e5 and content["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e5}
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| Loads with | transformers 5 and 4" in card and f"torch {torch.__version__}" in card
    assert main(["import", "--hf-dir", str(tmp_path / "hf"), "--output", str(tmp_path / "save")]) == 0
    export_checkpoint(tmp_path / "save", tmp_path / "again", verify="none")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == content
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "hf"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_bundled_code_says_which_version_it_needs(tmp_path):
    """Under transformers 4, of which there is nothing here but its version: the message comes before any import."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text('__version__ = "4.57.6"\n')
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "__init__.py").touch()
    for name, source in bundle_files().items():
        shutil.copyfile(source, tmp_path / "model" / name)
    words = [sys.executable, "-c", "import sys; sys.path.insert(0, '.'); import model.configuration_phd"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 1 and "ImportError" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "needs transformers 5 or later, and transformers 4.57.6 is installed; update it: pip install" in last
