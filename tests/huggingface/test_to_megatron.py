"""Export to Megatron-Core's own GPT model: every tensor by hand; what that model cannot be is refused by name.

That the model loads it and computes the same is shown in ``tests/integration/test_stock_checkpoints.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from phd_megatron.checkpoint.reader import CheckpointReader
from phd_megatron.checkpoint.stock import Stock
from phd_megatron.errors import UserError
from phd_megatron.huggingface.checkpoint import MegatronCheckpoint
from phd_megatron.huggingface.to_megatron import export_to_megatron

MOE = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 16}


def with_experts(layers, bias=False):
    """An ``edit`` for ``make_checkpoint``: some layers' FFNs become four experts."""

    def edit(tensors):
        for layer in layers:
            mlp = f"decoder.layers.{layer}.mlp."
            for name, shape in {"linear_fc1": (4, 32, 24), "linear_fc2": (4, 24, 16)}.items():
                del tensors[f"{mlp}{name}.weight"]
                tensors[f"{mlp}experts.experts.{name}.weight"] = torch.randn(shape)
            tensors[f"{mlp}router.weight"] = torch.randn(4, 24)
            if bias:
                tensors[f"{mlp}router.expert_bias"] = torch.randn(4)

    return edit


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    """Tensors of a stock checkpoint, without our reader."""
    from torch.distributed import checkpoint as dcp

    metadata = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    sizes = {key: entry for key, entry in metadata.items() if hasattr(entry, "size")}
    found = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in sizes.items()}
    dcp.load(found, checkpoint_id=directory, no_dist=True)
    return found


def of_ours(source: Path) -> dict[str, torch.Tensor]:
    checkpoint = MegatronCheckpoint(source)
    return {key: checkpoint.read(key) for key in checkpoint.tensors}


def test_layers_lie_together(make_checkpoint, tmp_path):
    source = make_checkpoint(norm_scheme="pre_qk", untie_embeddings_and_output_weights=True)
    said = export_to_megatron(source, tmp_path / "out")
    assert said.endswith("27 tensors read, 11 written, verified")
    ours, theirs = of_ours(source), read_all(tmp_path / "out" / "iter_0000100")
    for name in ("embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"):
        assert torch.equal(theirs.pop(name), ours[name])
    names = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
        **{name: name for name in ("mlp.linear_fc1.weight", "mlp.linear_fc2.weight")},
        **{f"self_attention.{n}.weight": f"self_attention.{n}.weight" for n in ("linear_qkv", "linear_proj")},
        **{f"self_attention.{n}_layernorm.weight": f"self_attention.{n}_layernorm.weight" for n in "qk"},
    }
    assert theirs.keys() == {f"decoder.layers.{name}" for name in names}
    for name, own in names.items():
        for layer in range(3):
            assert torch.equal(theirs[f"decoder.layers.{name}"][layer], ours[f"decoder.layers.{layer}.{own}"])
    assert json.loads((tmp_path / "out" / "iter_0000100" / "metadata.json").read_text())["common_backend"] == "torch"


def test_layers_that_differ_are_numbered(make_checkpoint, tmp_path):
    source = make_checkpoint(
        norm_scheme="pre", transformer={**MOE, "moe_layer_freq": [0, 1, 1]}, edit=with_experts([1, 2])
    )
    export_to_megatron(source, tmp_path / "out")
    ours, theirs = of_ours(source), read_all(tmp_path / "out" / "iter_0000100")
    assert torch.equal(
        theirs["decoder.layers.0.mlp.linear_fc1.layer_norm_weight"], ours["decoder.layers.0.pre_mlp_layernorm.weight"]
    )
    assert "decoder.layers.0.pre_mlp_layernorm.weight" not in theirs
    for name in ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"):
        assert torch.equal(theirs[f"decoder.layers.1.{name}"], ours["decoder.layers.1.pre_mlp_layernorm.weight"])
    experts = "decoder.layers.2.mlp.experts.experts.linear_fc2.weight"
    assert theirs[experts].shape == (4, 24, 16) and torch.equal(theirs[experts], ours[experts])


def test_it_says_what_it_is(make_checkpoint, tmp_path):
    source = make_checkpoint(norm_scheme="pre", layernorm_epsilon=1e-6, rotary_base=500000.0)
    export_to_megatron(source, tmp_path / "out")
    path = tmp_path / "out" / "iter_0000100"
    said = Stock.read(path, CheckpointReader(path))
    expected = {"num_layers": 3, "hidden_size": 24, "ffn_hidden_size": 40, "num_attention_heads": 6}
    expected |= {"num_query_groups": 2, "kv_channels": 8, "norm_epsilon": 1e-6, "rotary_base": 500000.0}
    expected |= {"swiglu": True, "untie_embeddings_and_output_weights": False, "num_experts": None}
    expected |= {"vocab_size": 257, "padded_vocab_size": 384, "group_query_attention": True, "iteration": 100}
    assert {name: said.model[name] for name in expected} == expected
    assert said.common["iteration"] == 100 and said.common["checkpoint_version"] == 3.0


def test_an_untrained_model_is_a_release(make_checkpoint, tmp_path):
    source = make_checkpoint(norm_scheme="pre")
    (source / "iter_0000100").rename(source / "iter_0000000")
    (source / "iter_0000000" / "training_state.json").write_text('{"iteration": 0}')
    (source / "latest_checkpointed_iteration.txt").write_text("0")
    export_to_megatron(source, tmp_path / "out")
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "release\n"
    assert (tmp_path / "out" / "release" / "metadata.json").is_file()


def test_another_type_of_number(make_checkpoint, tmp_path):
    transformer = {**MOE, "moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}
    source = make_checkpoint(norm_scheme="pre", transformer=transformer, edit=with_experts(range(3), bias=True))
    export_to_megatron(source, tmp_path / "out", dtype="bfloat16")
    ours, theirs = of_ours(source), read_all(tmp_path / "out" / "iter_0000100")
    bias = theirs.pop("decoder.layers.mlp.router.expert_bias")
    assert bias.dtype == torch.float32, "rounded, other experts would be chosen"
    assert {tensor.dtype for tensor in theirs.values()} == {torch.bfloat16}
    name = "embedding.word_embeddings.weight"
    assert torch.equal(theirs[name], ours[name].bfloat16())


REFUSED = {
    "copies": ({"norm_scheme": "pre", "phd_repeat": 2}, "phd_repeat=2: that model knows no copies of a token"),
    "hybrid": ({"norm_scheme": "hybrid"}, "norm_scheme=hybrid: that model is the one of pre or pre_qk"),
    "hybrid_star": ({"norm_scheme": "hybrid_star"}, "norm_scheme=hybrid_star: that model is the one of pre or pre_qk"),
    "post": ({"norm_scheme": "post"}, "norm_scheme=post: that model is the one of pre or pre_qk"),
    "olmoe": ({"norm_scheme": "olmoe"}, "norm_scheme=olmoe: that model is the one of pre or pre_qk"),
    "embed_norm": ({"norm_scheme": "embed_norm"}, "norm_scheme=embed_norm: that model is the one of pre or pre_qk"),
}


@pytest.mark.parametrize(("fields", "said"), REFUSED.values(), ids=REFUSED)
def test_what_the_stock_model_cannot_be(make_checkpoint, tmp_path, fields, said):
    source = make_checkpoint(**fields)
    with pytest.raises(UserError, match=said):
        export_to_megatron(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_may_be_replaced(make_checkpoint, tmp_path):
    source, out = make_checkpoint(norm_scheme="pre"), tmp_path / "out"
    export_to_megatron(source, out)
    with pytest.raises(UserError, match="--overwrite"):
        export_to_megatron(source, out)
    export_to_megatron(source, out, overwrite=True)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt in it is no file that an export wrote"):
        export_to_megatron(source, out, overwrite=True)
    (out / "notes.txt").unlink()
    (out / "exported.json").write_text("{}")
    with pytest.raises(UserError, match=r"exported\.json does not say that phd-megatron exported it"):
        export_to_megatron(source, out, overwrite=True)


def test_a_tensor_that_the_disk_holds_otherwise_is_named(make_checkpoint, tmp_path, monkeypatch):
    from phd_megatron.huggingface import to_megatron

    def flipped(*args, **options):
        saved = save(*args, **options)
        (shard,) = Path(options["storage_writer"].path).glob("*.distcp")
        content = shard.read_bytes()
        needle = MegatronCheckpoint(source).read("embedding.word_embeddings.weight").numpy().tobytes()[:64]
        assert content.count(needle) == 1
        shard.write_bytes(content.replace(needle, needle[::-1]))
        return saved

    source, save = make_checkpoint(norm_scheme="pre"), to_megatron.dcp.save
    monkeypatch.setattr(to_megatron.dcp, "save", flipped)
    with pytest.raises(UserError, match=r"embedding\.word_embeddings\.weight is not in .* what was written|is damaged"):
        export_to_megatron(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_was_written_is_compared_a_layer_at_a_time(make_checkpoint, tmp_path, monkeypatch):
    from phd_megatron.huggingface.to_megatron import _Comparison

    asked = []

    def resolved(self, read_item):
        asked.append(tuple(read_item.lengths))
        return resolve(self, read_item)

    resolve = _Comparison.resolve_tensor
    monkeypatch.setattr(_Comparison, "resolve_tensor", resolved)
    export_to_megatron(make_checkpoint(norm_scheme="pre"), tmp_path / "out")
    assert asked.count((1, 24, 40)) == 3 and (3, 24, 40) not in asked, "mlp.linear_fc2"
    assert len(asked) == 2 + 3 * 6
