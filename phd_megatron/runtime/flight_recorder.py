"""NCCL's flight recorder: switched on by variables, before the first process group."""

from __future__ import annotations

import os
import tempfile


def record_flights(directory: str | None) -> None:
    """Have NCCL's flight recorder write what every rank was in when a collective timed out; own settings stay."""
    prefix = os.path.join(directory or tempfile.gettempdir(), "nccl_trace_rank_")
    for name, value in {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": prefix,
        # their names in newer releases
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": prefix,
    }.items():
        os.environ.setdefault(name, value)
