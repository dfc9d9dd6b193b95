"""The PHD idea.

Visibility (:mod:`.kv_policy`), the layout of the copies (:mod:`.copies`) and their RoPE positions
(:mod:`.copy_positions`).
"""
