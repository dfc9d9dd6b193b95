"""``run_cases.py``, which writes beside each case's metrics file how many micro-batches were run in pieces.

The argument is a JSON file with a list of argument lists. ``METRICS.plans`` gets the number of rank 0.
"""

import json
import os
import sys
from functools import wraps
from pathlib import Path

from phd_megatron.cli.main import main
from phd_megatron.runtime.context import install_backend

install_backend("cpu")  # before Megatron is imported

from megatron.core.models.gpt import GPTModel  # noqa: E402

made = 0
build = GPTModel.build_schedule_plan


@wraps(build)
def counted(*args, **kwargs):  # type: ignore[no-untyped-def]
    global made
    made += 1
    return build(*args, **kwargs)


GPTModel.build_schedule_plan = counted
for case in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
    made = 0
    if code := main(case):
        raise SystemExit(f"{' '.join(case)} ended with {code}")
    if os.environ["RANK"] == "0":
        Path(case[case.index("--metrics-file") + 1] + ".plans").write_text(str(made), encoding="utf-8")
