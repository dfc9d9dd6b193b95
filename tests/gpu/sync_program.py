"""Train with the real program and print where the host waited for the device inside training steps.

    python sync_program.py WARM_UP pretrain OPTIONS...

The last line of the output is JSON: ``{"steps": N, "sites": {"file:line": times}}``, over the steps after the first
WARM_UP ones, which compile kernels and fill caches. What lies outside of a step (the log's reading of the loss,
checkpoints, evaluation) is not watched.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from typing import Any

import torch

from phd_megatron.cli.main import main
from phd_megatron.runtime.context import install_backend

device = "cuda" if torch.cuda.is_available() else "cpu"
install_backend(device)  # before Megatron is imported

from phd_megatron.training.step import Stepper  # noqa: E402

warm_up = int(sys.argv[1])
sites: Counter[str] = Counter()
steps = 0
train = Stepper.train


def watched(self: Stepper, *args: Any, **options: Any) -> Any:
    global steps
    steps += 1
    if steps <= warm_up:
        return train(self, *args, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            return train(self, *args, **options)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            for warning in caught:
                if "synchronizing CUDA operation" in str(warning.message):
                    sites[f"{warning.filename}:{warning.lineno}"] += 1


Stepper.train = watched  # type: ignore[method-assign]
code = main(sys.argv[2:])
print(json.dumps({"steps": steps - warm_up, "sites": dict(sites)}))
raise SystemExit(code)
