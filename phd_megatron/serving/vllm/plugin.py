"""What vLLM calls when it starts (entry point ``vllm.general_plugins``), in each of its processes.

It makes two names known: the configuration's ``model_type``, so that an export loads without running the code in its
directory, and the architecture. Nothing else changes in vLLM, and exports of other families stay with its own classes.
"""

from __future__ import annotations


def register() -> None:
    """Make the exports' class known to vLLM. May be called more than once."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from phd_megatron.huggingface.families.phd import MODEL_CLASS
    from phd_megatron.serving.vllm.configuration import PHDConfig

    AutoConfig.register(PHDConfig.model_type, PHDConfig, exist_ok=True)
    ModelRegistry.register_model(MODEL_CLASS, f"phd_megatron.serving.vllm.model:{MODEL_CLASS}")
