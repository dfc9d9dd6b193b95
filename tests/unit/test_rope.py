"""Frequencies of RoPE that are stretched for a longer context, against both libraries and a loop over the papers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from phd_megatron.config.architecture import architecture_of
from phd_megatron.config.resolve import resolve
from phd_megatron.config.rope import Yarn, rope_problems, scaling_of
from phd_megatron.config.schema import ModelConfig, ParallelConfig, RunConfig
from phd_megatron.huggingface.rope import rope_words
from phd_megatron.phd.copy_positions import rotary_positions
from phd_megatron.runtime.context import Runtime

HEAD = 64
YARN = {
    **{"position_embedding_type": "yarn", "yarn_rotary_scaling_factor": 40.0},
    **{"yarn_original_max_position_embeddings": 4096, "rotary_base": 1e6},
}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {"rotary_base": 5e5},
    "llama3": {"use_rope_scaling": True, "rope_scaling_factor": 32.0, "rotary_base": 5e5},
    "yarn": YARN,
    "yarn, mscale": {**YARN, "yarn_mscale": 0.7, "yarn_mscale_all_dim": 0.5},
    "yarn, mscale alone": {**YARN, "yarn_mscale": 0.7},
    "yarn, not rounded": {**YARN, "yarn_correction_range_round_to_int": False, "yarn_beta_fast": 16.0},
}


@pytest.fixture(scope="module")
def runtime():
    with Runtime.start(ParallelConfig(device="cpu"), verbose=False) as started:
        yield started


def built(**fields: Any) -> tuple[ModelConfig, Any]:
    from phd_megatron.model.build import build_model

    sizes = {
        "num_layers": 1,
        "hidden_size": 2 * HEAD,
        "ffn_hidden_size": 32,
        "num_attention_heads": 2,
        "seq_length": 64,
    }
    run = RunConfig(model=ModelConfig(**{**sizes, **fields}))
    run.training.train_iters = 1
    resolve(run)
    return run.model, build_model(run, 50, torch.device("cpu"))[0]


def by_hand(model: ModelConfig, width: int) -> tuple[list[float], float]:
    """Python's float64 numbers, one dimension after the other."""
    found = []
    for pair in range(width // 2):
        frequency = model.rotary_base ** (-2 * pair / width)
        if model.use_rope_scaling:
            wave, old = 2 * math.pi / frequency, 8192
            keep = min(1.0, max(0.0, (old / wave - 1) / (4 - 1)))
            frequency *= keep + (1 - keep) / model.rope_scaling_factor
        if model.position_embedding_type == "yarn":
            old, stretch = model.yarn_original_max_position_embeddings, model.yarn_rotary_scaling_factor
            assert old and stretch
            ends = [
                width * math.log(old / (2 * math.pi * turns)) / (2 * math.log(model.rotary_base))
                for turns in (model.yarn_beta_fast, model.yarn_beta_slow)
            ]
            if model.yarn_correction_range_round_to_int:
                ends = [math.floor(ends[0]), math.ceil(ends[1])]
            low, high = max(ends[0], 0), min(ends[1], width - 1)
            keep = 1 - min(1.0, max(0.0, (pair - low) / (high - low)))
            frequency *= keep + (1 - keep) / stretch
        found.append(frequency)
    if model.position_embedding_type != "yarn":
        return found, 1.0
    log = 0.1 * math.log(model.yarn_rotary_scaling_factor or 1)
    return found, (log * model.yarn_mscale + 1) / (log * model.yarn_mscale_all_dim + 1)


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_frequencies_are_those_of_the_papers_and_of_transformers(runtime, fields, share) -> None:
    """Transformers' bit for bit, the loop's within 1e-5 relative.

    Float32 loses digits where a part of nearly 1 is taken from 1.
    """
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model, ours = built(**fields, rotary_percent=share)
    frequencies, factor = by_hand(model, int(HEAD * share))
    expected = torch.tensor(frequencies, dtype=torch.float64)
    assert ((ours.frequencies.double() - expected) / expected).abs().max() < 1e-5
    assert ours.attention_factor == pytest.approx(factor, rel=1e-12)
    words = rope_words(architecture_of(model))
    if words["rope_type"] == "default":
        return
    config = LlamaConfig(head_dim=HEAD, max_position_embeddings=40 * 4096, rope_parameters=dict(words))
    theirs, their_factor = ROPE_INIT_FUNCTIONS[words["rope_type"]](config, torch.device("cpu"))
    assert torch.equal(ours.frequencies, theirs) and ours.attention_factor == pytest.approx(their_factor, rel=1e-15)
    assert scaling_of(model) != scaling_of(ModelConfig())


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_angles_are_megatron_cores(runtime, fields) -> None:
    """Of the first 10,000 positions, bit for bit."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

    model, ours = built(**fields)
    factor = 1.0
    if model.position_embedding_type == "yarn":
        theirs = YarnRotaryEmbedding(
            kv_channels=HEAD,
            rotary_base=model.rotary_base,
            scaling_factor=model.yarn_rotary_scaling_factor,
            original_max_position_embeddings=model.yarn_original_max_position_embeddings,
            beta_fast=model.yarn_beta_fast,
            beta_slow=model.yarn_beta_slow,
            mscale=model.yarn_mscale,
            mscale_all_dim=model.yarn_mscale_all_dim,
            correction_range_round_to_int=model.yarn_correction_range_round_to_int,
        )
        angles, factor = theirs(10_000)
    else:
        scaling = {"rope_scaling": model.use_rope_scaling, "rope_scaling_factor": model.rope_scaling_factor}
        angles = RotaryEmbedding(HEAD, 1.0, rotary_base=model.rotary_base, **scaling)(10_000)
    table = ours._table_of(torch.arange(10_000)[:, None])
    half = angles[..., : HEAD // 2]
    assert torch.equal(table, torch.stack([half.cos() * factor, half.sin() * factor]))


@pytest.mark.parametrize("kind", ["token", "repeated", "fraction"])
def test_copies_go_through_the_same_frequencies(runtime, kind: str) -> None:
    model, ours = built(**YARN, phd_repeat=3, phd_copy_positions=kind)
    cos, sin = ours._table_of(torch.arange(64)[:, None])  # [3 * 64, 1, 1, HEAD / 2]
    frequencies, factor = by_hand(model, HEAD)
    for copy in (1, 2, 3):
        position = rotary_positions(torch.tensor(50), torch.tensor(copy), 3, kind).item()
        angles = torch.tensor([position * each for each in frequencies], dtype=torch.float64)
        row = (copy - 1) * 64 + 50
        torch.testing.assert_close(cos[row, 0, 0].double(), factor * angles.cos(), atol=3e-5, rtol=0)
        torch.testing.assert_close(sin[row, 0, 0].double(), factor * angles.sin(), atol=3e-5, rtol=0)


def test_what_does_not_fit_together() -> None:
    assert not list(rope_problems(ModelConfig())) and not list(rope_problems(ModelConfig(**YARN)))
    assert not list(rope_problems(ModelConfig(use_rope_scaling=True)))
    lacking = list(rope_problems(ModelConfig(position_embedding_type="yarn")))
    assert len(lacking) == 2 and all("has no default" in each for each in lacking)
    for changes, said in (
        ({"use_rope_scaling": True}, "leave one of them out"),
        ({"yarn_beta_fast": 1.0}, "raise the first"),
        ({"rotary_base": 1.0}, "use a base above 1"),
    ):
        (problem,) = rope_problems(ModelConfig(**{**YARN, **changes}))
        assert said in problem


def test_the_mscale_of_an_attention_factor() -> None:
    for factor in (1.5, 4.0, 40.0):
        for mscale in (0.0, 0.3, 1.0, 2.5):
            wanted = Yarn(factor, 4096, mscale=mscale).attention_factor
            assert Yarn(factor, 4096).mscale_for(wanted) == pytest.approx(mscale, abs=1e-12)
    assert Yarn(1.0, 4096, mscale=0.3).attention_factor == 1 and Yarn(1.0, 4096).mscale_for(1.0) == 1.0
    for factor, wanted in ((4.0, 0.99), (4.0, math.inf), (4.0, math.nan), (1.0, 1.1)):
        with pytest.raises(ValueError, match="is none that mscale gives"):
            Yarn(factor, 4096).mscale_for(wanted)
