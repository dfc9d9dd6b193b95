"""The exports' configuration under a name that every process of vLLM can import, since it is pickled between them."""

from __future__ import annotations

from transformers import PreTrainedConfig

from phd_megatron.huggingface.installed import config_class

PHDConfig: type[PreTrainedConfig] = type("PHDConfig", (config_class(),), {"__module__": __name__})
