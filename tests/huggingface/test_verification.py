"""What verification of an export or import compares, and how exactly: differences of a known size, and no numbers."""

from __future__ import annotations

import pytest
import torch

from phd_megatron.huggingface import bundle_files, megatron_logits, verify
from phd_megatron.huggingface.export import export_checkpoint
from phd_megatron.huggingface.verify import VerificationError


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(norm_scheme="hybrid_star", phd_repeat=2, phd_window=4, phd_chunk=8)


@pytest.fixture
def expected(model):
    """What the model computes of two sequences, under the names of Megatron's outputs."""
    tokens = torch.randint(61, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model(tokens, use_cache=False, output_hidden_states=True)
    layers = {megatron_logits.layer_name(index): out.hidden_states[index + 1].clone() for index in range(2)}
    return {megatron_logits.TOKENS: tokens, megatron_logits.LOGITS: out.logits.clone(), **layers}


def test_a_difference_above_one_in_100000_is_one(model, expected):
    """Relative, of the norm of all: the documented 1e-5."""
    verify._compare_outputs(model, expected)
    direction = torch.randn_like(expected["logits"])
    direction *= expected["logits"].norm() / direction.norm()
    verify._compare_outputs(model, {**expected, "logits": expected["logits"] + 0.8e-5 * direction})
    for sign in (1, -1):  # larger or smaller, and in the last layer alone
        moved = {**expected, "logits": expected["logits"] + sign * 1.3e-5 * direction}
        with pytest.raises(VerificationError, match=r"logits differ by 1\.3e-05 relative .*all layers but the last"):
            verify._compare_outputs(model, moved)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_first_layer_that_differs_is_named(model, expected, layer):
    moved = {**expected, "logits": 1.1 * expected["logits"]}
    for index in range(layer, 2):
        moved[megatron_logits.layer_name(index)] = (1 + 1e-3) * expected[megatron_logits.layer_name(index)]
    with pytest.raises(VerificationError, match=f"layer {layer} is the first whose output differs, by 1.0e-03"):
        verify._compare_outputs(model, moved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_megatrons_logits_must_be_numbers(model, expected, value):
    expected["logits"][1, 7, 3] = value
    with pytest.raises(VerificationError, match="own logits are not finite"):
        verify._compare_outputs(model, expected)


@torch.no_grad()
def test_an_export_whose_logits_are_no_numbers_is_another_model(make_model, expected):
    model = make_model(norm_scheme="hybrid_star", phd_repeat=2, phd_window=4, phd_chunk=8)
    verify._compare_outputs(model, expected)
    model.model.norm.weight[3] = float("nan")
    with pytest.raises(VerificationError, match=r"logits differ by nan relative .*all layers but the last agree"):
        verify._compare_outputs(model, expected)
    model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(VerificationError, match="layer 1 is the first whose output differs, by nan"):
        verify._compare_outputs(model, expected)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_logits_that_are_no_numbers_do_not_pass_without_megatron(make_checkpoint, tmp_path, monkeypatch, value):
    """``--verify tensors``: the weights are right, and what the code makes of them is not."""
    code = bundle_files.bundle_files()["modeling_phd.py"].read_text()
    good = "        hidden = self.norm(hidden)\n"
    assert code.count(good) == 1
    (tmp_path / "modeling_phd.py").write_text(code.replace(good, f'{good}        hidden[0, 5] = float("{value}")\n'))
    files = {**bundle_files.bundle_files(), "modeling_phd.py": tmp_path / "modeling_phd.py"}
    source = make_checkpoint(norm_scheme="hybrid_star", phd_repeat=2)
    assert export_checkpoint(source, tmp_path / "good", verify="tensors").verified == "tensors"
    monkeypatch.setattr(bundle_files, "bundle_files", lambda: files)
    with pytest.raises(VerificationError, match=r"logits that are not finite in torch\.float32"):
        # A name of its own: transformers keeps loaded code by the directory's name, also for the tests after this one.
        export_checkpoint(source, tmp_path / f"broken_{value}", verify="tensors")
    assert not (tmp_path / f"broken_{value}").exists()


def test_the_text_has_two_sequences_of_the_length_of_a_run(make_checkpoint):
    """Two rows, the second one the other half of the text; without a tokenizer ids that count up in the vocabulary."""
    from phd_megatron.huggingface.checkpoint import MegatronCheckpoint

    found = verify._tokens(MegatronCheckpoint(make_checkpoint("short", seq_length=7, tokenizer=False, vocab_size=5)))
    assert found.tolist() == [[0, 1, 2, 3, 4, 0, 1], [2, 3, 4, 0, 1, 2, 3]]
    found = verify._tokens(MegatronCheckpoint(make_checkpoint("long", seq_length=4096)))
    assert found.shape == (2, 128) and bytes(found.flatten().tolist()) == verify._TEXT[:256].encode()


def test_the_loss_of_a_text_is_of_its_tokens_after_the_first():
    tokens = torch.tensor([[4, 1, 2], [0, 3, 3]])
    logits = torch.randn(2, 3, 5, dtype=torch.float64)
    chosen = [logits[b, n].log_softmax(-1)[tokens[b, n + 1]] for b in range(2) for n in range(2)]
    assert verify._text_loss({"logits": logits, "tokens": tokens}) == pytest.approx(-sum(chosen).item() / 4)


def test_bits_that_differ_are_named(make_checkpoint, tmp_path):
    """One bit of one value, after the directory was written."""
    from safetensors.torch import load_file, save_file

    from phd_megatron.huggingface.checkpoint import MegatronCheckpoint
    from phd_megatron.huggingface.export import describe
    from phd_megatron.huggingface.families import FAMILIES
    from phd_megatron.huggingface.mapping import model_rules

    source = MegatronCheckpoint(make_checkpoint(untie_embeddings_and_output_weights=True))
    export_checkpoint(source.directory, tmp_path / "hf", verify="none")
    rules = model_rules(describe(source)[0], FAMILIES["llama"])
    path = tmp_path / "hf" / "model.safetensors"
    verify.verify_export(tmp_path / "hf", source, rules, torch.float32, "tensors")
    for name, mcore in (("lm_head", "output_layer"), ("model.layers.2.mlp.up_proj", "decoder.layers.2.mlp.linear_fc1")):
        weights = load_file(path)
        weights[f"{name}.weight"][-1, -1] = torch.nextafter(weights[f"{name}.weight"][-1, -1], torch.tensor(9.0))
        save_file(weights, path, metadata={"format": "pt"})
        with pytest.raises(VerificationError, match=f"do not give {mcore}.weight back"):
            verify.verify_export(tmp_path / "hf", source, rules, torch.float32, "tensors")
        export_checkpoint(source.directory, tmp_path / "hf", verify="none", overwrite=True)


def test_what_the_other_process_said_last_is_the_reason(make_checkpoint):
    """It is made to build a model that the checkpoint does not fit."""
    from phd_megatron.huggingface.checkpoint import MegatronCheckpoint

    source = MegatronCheckpoint(make_checkpoint())
    with pytest.raises(VerificationError, match=r"\(exit code \d\): .*Error: .*; --verify tensors"):
        verify._megatron_outputs(source, torch.float32, {"hidden_size": 48})
