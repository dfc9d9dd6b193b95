"""Hugging Face directories as Megatron checkpoints: what a family's ``config.json`` means, and its weights."""
