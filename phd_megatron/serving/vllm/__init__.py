"""PHD and HybridNorm exports in vLLM: a plugin that vLLM finds by its entry point."""
