"""Steps of real ranks over gloo, counted as a dry run counts its own.

Runs under torchrun with a directory and cases of `dry_run_cases.py`; each rank writes a file of JSON there, with a list
of what it counted for each case.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from dry_run_cases import configuration

from phd_megatron.planning.dry_plan import collectives
from phd_megatron.planning.groups import groups_of_this_rank
from phd_megatron.planning.trace import Trace
from phd_megatron.runtime.context import Runtime


def counted(case: str, ranks: int, rank: int) -> dict[str, object]:
    """One step of this rank, after one that is not counted."""
    from phd_megatron.training.dry_run import routing_of, traced

    run, count = configuration(case, ranks)
    with Runtime.start(run.parallel, model=run.model, training=run.training, verbose=False) as runtime:
        run.parallel.sequence_parallel = runtime.dims.sp
        groups = groups_of_this_rank()
        with routing_of(run, runtime.dims):
            found = traced(run, runtime.dims, (count,), Trace())
    (step,) = found.steps
    return {
        "held": found.held,
        "peak": step.peak,
        "collectives": collectives(step.counts, groups, rank, 2),
        "flops": step.counts.flops,
        "path": found.path,
    }


if __name__ == "__main__":
    directory, *cases = sys.argv[1:]
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    rows = [counted(case, ranks, rank) for case in cases]
    Path(directory, f"{rank}.json").write_text(json.dumps(rows), "utf-8")
