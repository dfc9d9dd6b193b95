"""Context-parallel attention over gloo process groups, started by torchrun."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "context_parallel_program.py"
Launcher = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_outputs_gradients_and_bytes(torchrun: Launcher, ranks: int) -> None:
    output = torchrun(ranks, PROGRAM, "cases", timeout=300).stdout
    lines = re.findall(r"OK rank \d+ (\S+): .*", output)
    assert len(lines) == 11 * ranks and {"vanilla", "PHD-2", "PHD-SWA-2-6-inf", "PHD-CSWA-3-6-7"} <= set(lines)


def test_every_message_arrives_where_it_is_meant_and_merges_are_in_float32(torchrun: Launcher) -> None:
    """Three ranks: a ring with a way of more than one step, and pairs of ranks with messages of every kind."""
    output = torchrun(3, PROGRAM, "flight", "halves", timeout=300).stdout
    assert output.count("OK flight") == output.count("OK bfloat16") == 3


@pytest.mark.parametrize("ranks", [2, 3])
def test_documents_that_are_kept_apart(torchrun: Launcher, ranks: int) -> None:
    """Wherever they begin; those that a slice goes on with see what lies on other ranks."""
    output = torchrun(ranks, PROGRAM, "documents", timeout=300).stdout
    assert output.count("OK documents: worst") == ranks
    lines = re.findall(r"OK ([\w ]+), (\S+)", output)
    assert len({name for name, _ in lines}) == 5 and len({policy for _, policy in lines}) == 11


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.full)])
def test_fused_kernels(torchrun: Launcher, ranks: int) -> None:
    pytest.importorskip("triton", reason="Triton is for Linux")
    output = torchrun(ranks, PROGRAM, "fused", "fused_documents", timeout=300).stdout
    for backend in ("triton", "sdpa_triton"):
        assert output.count(f"OK {backend} PHD") + output.count(f"OK {backend} vanilla") == 4 * ranks
        assert output.count(f"OK {backend} documents, ") == 3 * ranks


def test_parts_that_must_not_go_missing_and_overlap(torchrun: Launcher) -> None:
    output = torchrun(3, PROGRAM, "broken", "overlap", timeout=300).stdout
    print(output)
    for name in ("halo", "zigzag"):
        wrong = re.search(rf"without {name}: wrong on (\d) ranks", output)
        assert wrong and int(wrong[1]) >= 1
    for direction in ("forward", "backward"):
        events = re.findall(rf"TRACE {direction} (\w+) (\d)", output)
        # Each transfer is under way before the block already there is computed, and waited for only afterwards.
        expected = ["start 1", "compute 0", "wait 1", "arrived 1", "start 2", "compute 1", "wait 2", "arrived 2"]
        assert [" ".join(event) for event in events] == [*expected, "compute 2"]
