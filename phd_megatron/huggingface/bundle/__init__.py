"""Sources of the files that make an exported model self-contained.

The exporter copies them flat beside ``kv_policy.py``, ``norm_schemes.py`` and the attention parts; there their relative
imports resolve. Inside the package nobody imports them: an exported directory is loaded with ``AutoModelForCausalLM``.
"""
