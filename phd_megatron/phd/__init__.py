"""The PHD idea: visibility (:mod:`.kv_policy`) and the layout of the copies (:mod:`.copies`)."""
