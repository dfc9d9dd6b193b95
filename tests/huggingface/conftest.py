"""Shared by the Hugging Face tests: where transformers may put its copies of remote code, and tiny models."""

from __future__ import annotations

import os
import tempfile

# transformers copies a directory's code here when it loads it; it reads the variable when it is imported.
os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp(prefix="phd-hf-modules-"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import warnings

import pytest

AUTO_MAP = {"AutoConfig": "configuration_phd.PHDConfig", "AutoModelForCausalLM": "modeling_phd.PHDForCausalLM"}
TINY = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="session")
def bundle_directory(tmp_path_factory):
    """A directory with the exported model's own files and no weights."""
    from phd_megatron.huggingface.bundle_files import write_bundle

    directory = tmp_path_factory.mktemp("bundle")
    write_bundle(directory)
    config = {"model_type": "phd_transformer", "architectures": ["PHDForCausalLM"], "auto_map": AUTO_MAP, **TINY}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def make_model(bundle_directory):
    """``make_model(**config_fields)``: a seeded random model in float64 and eval mode, norm weights not all one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(dtype=torch.float64, seed=0, **fields):
        config = AutoConfig.from_pretrained(bundle_directory, trust_remote_code=True, **fields)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=dtype).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        return model

    return make


#: A small run: every size differs from the others, so a transposed or misread dimension shows.
RUN = {
    "num_layers": 3,
    "hidden_size": 24,
    "ffn_hidden_size": 40,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "kv_channels": 8,
    "seq_length": 64,
    "make_vocab_size_divisible_by": 128,
    "vocab_size": 257,
}


def write_checkpoint(place, dtype=None, edit=None, tokenizer=True, seed=0, **model):
    """What a training run leaves in ``place``, with random weights.

    ``edit`` may change the dictionary of tensors before it is saved, ``tokenizer`` False leaves that out.
    """
    import torch
    from torch.distributed import checkpoint as dcp

    from phd_megatron.config.schema import RunConfig
    from phd_megatron.config.serialize import dump_yaml
    from phd_megatron.data.tokenizers import load_tokenizer

    run = RunConfig()
    for field, value in {**RUN, **model}.items():
        assert hasattr(run.model, field)
        setattr(run.model, field, value)
    directory = place / "iter_0000100"
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        key: (0.2 * torch.randn(shape, generator=generator) + ("layernorm.weight" in key)).to(dtype or torch.float32)
        for key, shape in mcore_shapes(run.model).items()
    }
    tensors["optimizer.state.exp_avg.decoder.final_layernorm.weight"] = torch.zeros(24)
    if edit is not None:
        edit(tensors)
    state = {**tensors, "rng_state/shard_0.0_1.1": {"seed": 1}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=directory, no_dist=True)
    dump_yaml(run, directory / "run_config.yaml")
    if tokenizer:
        load_tokenizer("byte").save(directory / "tokenizer")
    (directory / "training_state.json").write_text(json.dumps({"iteration": 100, "consumed_samples": 1600}))
    (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (place / "latest_checkpointed_iteration.txt").write_text("100")


@pytest.fixture
def make_checkpoint(tmp_path):
    """``make_checkpoint(**model_fields) -> SAVE directory``, see :func:`write_checkpoint`."""

    def make(name="run", **words):
        write_checkpoint(tmp_path / name, **words)
        return tmp_path / name

    return make


def mcore_shapes(model) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a dense model's parameters as Megatron-Core saves them, written out by hand."""
    h, f, d = model.hidden_size, model.ffn_hidden_size, model.kv_channels
    heads, groups = model.num_attention_heads, model.num_query_groups
    padded = -(-model.vocab_size // model.make_vocab_size_divisible_by) * model.make_vocab_size_divisible_by
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (padded, h)}
    norms: dict[str, int] = {"decoder.final_layernorm": h}
    if model.norm_scheme == "embed_norm":
        norms["embed_norm"] = h
    if model.phd_copy_embedding == "vector":
        shapes["copy_embedding.weight"] = (model.phd_repeat - 1, h)
    for i in range(model.num_layers):
        layer = f"decoder.layers.{i}"
        no_input = model.norm_scheme in ("hybrid", "embed_norm") or (model.norm_scheme == "hybrid_star" and i > 0)
        if model.norm_scheme in ("post", "olmo2"):
            norms |= {f"{layer}.attention_output_layernorm": h, f"{layer}.mlp_output_layernorm": h}
        else:
            norms |= {f"{layer}.pre_mlp_layernorm": h}
            norms |= {} if no_input else {f"{layer}.input_layernorm": h}
        inner = {"pre": "", "post": "", "pre_qk": "qk", "olmo2": "qk", "pre_qkvc_post": "qkvc"}
        full = {"q": heads * d, "k": groups * d} if model.norm_scheme == "olmo2" else {}
        for part in inner.get(model.norm_scheme, "qkv"):
            norms[f"{layer}.self_attention.{part}_layernorm"] = full.get(part, d)
        linears = {
            "self_attention.linear_qkv": ((heads + 2 * groups) * d, h),
            "self_attention.linear_proj": (h, heads * d),
            "mlp.linear_fc1": ((2 if model.gated_linear_unit else 1) * f, h),
            "mlp.linear_fc2": (h, f),
        }
        for name, shape in linears.items():
            shapes[f"{layer}.{name}.weight"] = shape
            if model.add_bias_linear or (model.add_qkv_bias and "qkv" in name):
                shapes[f"{layer}.{name}.bias"] = shape[:1]
    for name, size in norms.items():
        shapes[f"{name}.weight"] = (size,)
        if model.normalization == "LayerNorm":
            shapes[f"{name}.bias"] = (size,)
    if model.untie_embeddings_and_output_weights:
        shapes["output_layer.weight"] = (padded, h)
    return shapes
