"""Decisions that ranks take together: two processes over gloo, and a world of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from phd_megatron.errors import UserError
from phd_megatron.runtime import agreement

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, sys
import torch.distributed as dist
from phd_megatron.errors import UserError
from phd_megatron.runtime import agreement

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
found, called = {}, []

def said(decide):
    try:
        return decide()
    except UserError as error:
        return f"refused: {error}"

def fails(*ranks, text="no {}", kind=UserError):
    def function():
        called.append(rank)
        if rank in ranks:
            raise kind(text.format(rank))
        return 10 + rank
    return function

found["world"] = [agreement.rank(), agreement.world_size()]
found["maximum"] = agreement.maximum([rank, 5 - rank, 3])
found["gather"] = agreement.gather({"of": rank})
found["from zero"] = said(lambda: agreement.from_rank_zero(fails(1)))
found["called"] = list(called)
found["zero refuses"] = said(lambda: agreement.from_rank_zero(fails(0)))
found["zero breaks"] = said(lambda: agreement.from_rank_zero(fails(0, kind=ValueError)))
found["everywhere"] = said(lambda: agreement.everywhere(fails()))
found["one"] = said(lambda: agreement.everywhere(fails(1)))
found["one breaks"] = said(lambda: agreement.everywhere(fails(1, kind=OSError)))
found["both"] = said(lambda: agreement.everywhere(fails(0, 1)))
found["both alike"] = said(lambda: agreement.everywhere(fails(0, 1, text="never")))
print(json.dumps(found), flush=True)
dist.barrier()
"""


def test_two_ranks_take_one_decision(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, str(rank), str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        zero, one = (json.loads(rank.communicate(timeout=300)[0].splitlines()[-1]) for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
    assert (zero.pop("world"), one.pop("world")) == ([0, 2], [1, 2])
    assert (zero.pop("called"), one.pop("called")) == ([0], []), "rank 1 is not asked"
    assert (zero.pop("everywhere"), one.pop("everywhere")) == (10, 11), "each has its own result"
    assert zero == one
    assert zero == {
        "maximum": [1, 5, 3],
        "gather": [{"of": 0}, {"of": 1}],
        "from zero": 10,
        "zero refuses": "refused: no 0",
        "zero breaks": "refused: ValueError: no 0",
        "one": "refused: rank 1: no 1",
        "one breaks": "refused: rank 1: OSError: no 1",
        "both": "refused: rank 0: no 0; rank 1: no 1",
        "both alike": "refused: never",
    }


def test_a_world_of_one() -> None:
    def refuse() -> Any:
        raise ValueError("broken")

    assert (agreement.rank(), agreement.world_size(), agreement.control_group()) == (0, 1, None)
    assert agreement.maximum((1, 2)) == [1, 2] and agreement.gather("x") == ["x"]
    assert agreement.from_rank_zero(lambda: 3) == agreement.everywhere(lambda: 3) == 3
    for decide in (agreement.from_rank_zero, agreement.everywhere):
        with pytest.raises(UserError, match=r"^ValueError: broken$"):
            decide(refuse)
