"""RoPE in config.json: what is taken, what is refused by name, and models whose context was stretched, in and out."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from phd_megatron.config.architecture import architecture_of
from phd_megatron.config.schema import ModelConfig
from phd_megatron.config.serialize import load_yaml
from phd_megatron.huggingface.config_json import READERS
from phd_megatron.huggingface.export import export_checkpoint
from phd_megatron.huggingface.rope import rope_words

from .test_import import SIZES, make_source, run, tensors  # noqa: F401 (a fixture)

SIZES_OF_LLAMA = {"num_layers": 1, "hidden_size": 128, "num_attention_heads": 2}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("rope", "reason"),
    [
        ({"rope_theta": 1.0}, "rope_theta must be a finite number above 1"),
        ({"rope_theta": float("inf")}, "rope_theta must be a finite number above 1"),
        ({"partial_rotary_factor": 0.0}, "partial_rotary_factor must be above 0"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor must be above 0"),
        ({"factor": 2.0}, "nothing here corresponds to"),
        ({"rope_type": "linear", "factor": 2.0}, "changes its frequencies"),
        ({"rope_type": "dynamic", "factor": 2.0}, "changes its frequencies"),
        ({"rope_type": "longrope"}, "changes its frequencies"),
        *(
            ({**LLAMA3, "factor": factor}, f"factor={factor!r}: it must be at least 1")
            for factor in (0, -2.0, 0.5, math.nan, math.inf)
        ),
        ({**LLAMA3, "factor": None}, "None is no number"),
        ({**LLAMA3, "factor": True}, "True is no number"),
        ({**LLAMA3, "low_freq_factor": 2.0}, r"low_freq_factor=2.0: .* has 1 alone"),
        ({**LLAMA3, "high_freq_factor": 8.0}, r"high_freq_factor=8.0: .* has 4 alone"),
        ({**LLAMA3, "original_max_position_embeddings": 4096}, r"original_max_position_embeddings=4096: .* 8192 alone"),
        ({**LLAMA3, "beta_fast": 32}, "nothing here corresponds to .*beta_fast"),
        ({**YARN, "factor": 0}, "factor=0: it must be at least 1"),
        ({**YARN, "factor": math.nan}, "factor=nan: it must be at least 1"),
        ({**YARN, "original_max_position_embeddings": 4096.5}, "original_max_position_embeddings=4096.5"),
        ({**YARN, "original_max_position_embeddings": None}, "original_max_position_embeddings=None"),
        ({**YARN, "truncate": "no"}, "truncate='no'"),
        ({**YARN, "attention_factor": 0.9}, "attention_factor=0.9 with factor=4 is none that mscale gives"),
        ({**YARN, "factor": 1.0, "attention_factor": 1.2}, "attention_factor=1.2 with factor=1 is none"),
        ({**YARN, "low_freq_factor": 1.0}, "nothing here corresponds to .*low_freq_factor"),
        ({"rope_theta": 500.0, "partial_rotary_factor": 0.5, "rope_type": "default"}, None),
        (None, None),
    ],
)
def test_what_is_said_of_rope(rope: dict[str, Any] | None, reason: str | None) -> None:
    model = ModelConfig()
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            READERS["rope_parameters"](model, rope)
        return
    READERS["rope_parameters"](model, rope)
    assert (model.rotary_base, model.rotary_percent) == ((500.0, 0.5) if rope else (10000.0, 1.0))


#: words -> the fields that they are, beside the defaults
TAKEN: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (LLAMA3, {"rotary_base": 5e5, "use_rope_scaling": True, "rope_scaling_factor": 8.0}),
    (
        {**LLAMA3, "factor": 32, "type": "llama3"},
        {"rotary_base": 5e5, "use_rope_scaling": True, "rope_scaling_factor": 32.0},
    ),
    (YARN, {}),
    ({**YARN, "beta_fast": 0, "beta_slow": None, "truncate": True}, {}),
    ({**YARN, "beta_fast": 16, "beta_slow": 2}, {"yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0}),
    ({**YARN, "truncate": False}, {"yarn_correction_range_round_to_int": False}),
    ({**YARN, "mscale": 0.7}, {}),  # transformers reads the two together alone
    ({**YARN, "mscale": 0.7, "mscale_all_dim": 0.5}, {"yarn_mscale": 0.7, "yarn_mscale_all_dim": 0.5}),
    ({**YARN, "attention_factor": 1.0}, {"yarn_mscale": 0.0}),
    ({**YARN, "attention_factor": 1.0, "mscale": 0.7, "mscale_all_dim": 0.5}, {"yarn_mscale": 0.0}),
    ({**YARN, "partial_rotary_factor": 0.5}, {"rotary_percent": 0.5}),
]


@pytest.mark.parametrize(("words", "fields"), TAKEN, ids=[str(number) for number in range(len(TAKEN))])
def test_scaled_rope_is_taken_over(words: dict[str, Any], fields: dict[str, Any]) -> None:
    """And what is written of it again gives transformers the same frequencies and the same factor."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if words["rope_type"] == "yarn":
        fields = {
            **{"rotary_base": 1e6, "position_embedding_type": "yarn", "yarn_rotary_scaling_factor": 4.0},
            **{"yarn_original_max_position_embeddings": 32768, **fields},
        }
    model = ModelConfig(**SIZES_OF_LLAMA)
    READERS["rope_parameters"](model, words)
    assert model == ModelConfig(**SIZES_OF_LLAMA, **fields)
    found = []
    for rope in (words, rope_words(architecture_of(model))):
        config = LlamaConfig(head_dim=64, max_position_embeddings=131072, rope_parameters=dict(rope))
        found.append(ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu")))
    (one, factor), (other, other_factor) = found
    assert torch.equal(one, other) and other_factor == pytest.approx(factor, rel=1e-15)


#: fields of our models, whose old contexts are shorter than the texts below
LONGER: dict[str, dict[str, Any]] = {
    "llama3": {"use_rope_scaling": True, "rope_scaling_factor": 4.0, "rotary_base": 5e5},
    "yarn": {
        **{"position_embedding_type": "yarn", "yarn_rotary_scaling_factor": 4.0, "rotary_base": 500.0},
        **{"yarn_original_max_position_embeddings": 16, "yarn_beta_fast": 4.0, "yarn_beta_slow": 0.5},
    },
}


def logits_of(directory, length: int) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
    tokens = torch.randint(257, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize(("scheme", "name"), [("pre", "llama"), ("pre_qk", "qwen3"), ("olmo2", "olmo2")])
@pytest.mark.parametrize("rope", LONGER.values(), ids=LONGER)
def test_native_classes_and_the_bundled_code_agree(make_checkpoint, tmp_path, scheme, name, rope):
    """As far as the model goes, four times its old context with yarn; within 1e-6 relative in float32."""
    source = make_checkpoint(norm_scheme=scheme, **rope)
    native = export_checkpoint(source, tmp_path / "native", verify="tensors")
    assert native.model_class.lower().startswith(name)
    export_checkpoint(source, tmp_path / "bundled", native=False, verify="tensors")
    found, expected = logits_of(tmp_path / "bundled", 64), logits_of(tmp_path / "native", 64)
    assert (found - expected).norm() / expected.norm() < 1e-6
    content = json.loads((tmp_path / "native" / "config.json").read_text())
    assert content["rope_parameters"] == {**content["rope_scaling"], "rope_theta": rope["rotary_base"]}
    plain = make_checkpoint(name="plain", norm_scheme=scheme, rotary_base=rope["rotary_base"])
    export_checkpoint(plain, tmp_path / "plain-hf", verify="none")
    other = logits_of(tmp_path / "plain-hf", 64)
    assert (other - expected).norm() / expected.norm() > 1e-5, "the scaling changes nothing"


@pytest.mark.parametrize(
    "fields",
    [
        {**LONGER["llama3"], "phd_repeat": 2, "norm_scheme": "hybrid", "rotary_percent": 0.5},
        {**LONGER["yarn"], "phd_repeat": 3, "norm_scheme": "hybrid_star", "phd_copy_positions": "repeated"},
        {**LONGER["yarn"], "yarn_mscale": 0.5, "phd_repeat": 2, "phd_copy_positions": "fraction", "norm_scheme": "pre"},
        {**LONGER["yarn"], "yarn_mscale": 0.7, "yarn_mscale_all_dim": 0.3, "rotary_percent": 0.5, "norm_scheme": "pre"},
        {**LONGER["yarn"], "yarn_correction_range_round_to_int": False, "max_position_embeddings": 128},
    ],
    ids=lambda fields: " ".join(map(str, fields.values())),
)
def test_our_own_exports_come_back(make_checkpoint, tmp_path, fields):
    """Logits are compared with Megatron's in ``test_against_megatron.py``."""
    source = make_checkpoint(**fields)
    report = export_checkpoint(source, tmp_path / "hf", verify="tensors")
    assert report.model_class == "PHDForCausalLM"
    assert run("--hf-dir", tmp_path / "hf", "--output", tmp_path / "save", "--verify", "none") == 0
    export_checkpoint(tmp_path / "save", tmp_path / "again", verify="none")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "again")]
    assert configs[0] == configs[1]
    model = load_yaml(next(tmp_path.glob("save/iter_*/run_config.yaml"))).model
    for name, value in fields.items():
        assert getattr(model, name) == (pytest.approx(value, rel=1e-12) if type(value) is float else value)


@pytest.mark.parametrize(
    ("name", "rope"),
    [
        ("llama", LLAMA3),
        ("olmo2", {**LLAMA3, "factor": 32.0}),
        ("qwen3", {**YARN, "original_max_position_embeddings": 16, "rope_theta": 500.0}),
        ("mixtral", {**YARN, "original_max_position_embeddings": 16, "attention_factor": 1.05}),
        ("olmoe", {**YARN, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 0.5}),
    ],
    ids=str,
)
def test_directories_of_others_come_in_and_go_out(make_source, tmp_path, name, rope):  # noqa: F811
    """In the words of transformers 5, or 4; the import of Qwen3 compares logits with Megatron's, within 1e-5."""
    width = {"head_dim": 8} if name == "mixtral" else {}  # transformers' YaRN cannot do without it there
    source = make_source(name, rope_parameters=dict(rope), **width)
    if name in ("qwen3", "olmo2"):
        content = json.loads((source / "config.json").read_text())
        del content["rope_parameters"]
        old = {key: value for key, value in rope.items() if key not in ("rope_type", "rope_theta")}
        content |= {"rope_theta": rope["rope_theta"], "rope_scaling": {**old, "type": rope["rope_type"]}}
        (source / "config.json").write_text(json.dumps(content))
    verify = "full" if name == "qwen3" else "none"
    assert run("--hf-dir", source, "--output", tmp_path / "save", "--verify", verify) == 0
    report = export_checkpoint(tmp_path / "save", tmp_path / "hf", verify="tensors")
    assert report.model_class != "PHDForCausalLM"
    before, after = tensors(source), tensors(tmp_path / "hf")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    expected, found = logits_of(source, 64), logits_of(tmp_path / "hf", 64)
    assert (found - expected).norm() / expected.norm() < 1e-6


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
def test_the_bundled_configuration_refuses_a_factor_that_is_none(make_model, factor):
    words = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    words |= {"original_max_position_embeddings": 8192, "rope_theta": 1e4}
    with pytest.raises(ValueError, match="of RoPE: it must be at least 1, and finite"):
        make_model(rope_parameters=words)
