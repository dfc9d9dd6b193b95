"""Shared by the Hugging Face tests: where transformers may put its copies of remote code, and tiny models."""

from __future__ import annotations

import os
import tempfile

# transformers copies a directory's code here when it loads it; it reads the variable when it is imported.
os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp(prefix="phd-hf-modules-"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json

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
