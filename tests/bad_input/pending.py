"""Rows whose cure is part of another change, by title: what each waits for. To be emptied as those changes come in."""

from __future__ import annotations

_RANGE = "an upper limit on the field"

PENDING: dict[str, str] = dict.fromkeys(
    (
        "pretrain RUN --phd-repeat 1000000",
        "pretrain RUN --train-iters 100000000",
        "pretrain RUN --global-batch-size 1000000000000",
    ),
    _RANGE,
)
