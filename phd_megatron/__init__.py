"""Pretraining of PHD-Transformers and HybridNorm models on Megatron-Core."""

__version__ = "0.2.0"
