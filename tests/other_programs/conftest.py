"""Exports in other programs, in an environment of its own: ``bash tests/run.sh --serving`` makes it.

Not in the main suite, whose processes collect this file too: it changes nothing of theirs.
"""

from __future__ import annotations

import importlib.util
import os

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine is in this process, where tests can look at it
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    os.environ.pop("TRITON_INTERPRET", None)  # the kernels' tests want it, and vLLM looks at it too
