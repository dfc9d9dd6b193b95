"""Before the first collective: do all ranks exist and have the same run in mind? Asked through the store alone."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

from phd_megatron.config.plain import Values
from phd_megatron.errors import UserError
from phd_megatron.runtime.meeting import did_not_answer

if TYPE_CHECKING:
    from torch.distributed import Store


def flatten(config: Values, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted name and JSON text of every leaf of a nested configuration."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, sort_keys=True, default=str)


def compare_ranks(
    store: Store,
    rank: int,
    world_size: int,
    config: Values | None,
    versions: Mapping[str, str],
    seconds: float,
) -> None:
    """Refuse a run whose ranks are missing or differ from rank 0.

    Args:
        store: a ``torch.distributed`` store that all ranks share.
        config: the resolved configuration as plain values; rank-dependent values must not be in it.
        versions: name and version of what must be equal everywhere.
        seconds: how long to wait for the others.

    Raises:
        UserError: naming the ranks that did not come, or those that differ and in what.
    """
    mine = {**dict(flatten(config or {})), **{f"version of {name}": version for name, version in versions.items()}}
    text = json.dumps(mine, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    where = f"{platform.node()} pid {os.getpid()}"
    if rank == 0:
        store.set("preflight/reference", text)
    store.set(f"preflight/rank/{rank}", json.dumps([digest, where]))
    ranks = _collect(store, world_size, seconds)
    differing = [other for other in range(world_size) if ranks[other][0] != ranks[0][0]]
    if not differing:
        return
    reference = json.loads(store.get("preflight/reference"))
    if rank != 0:
        names = [name for name in sorted({*reference, *mine}) if reference.get(name) != mine.get(name)]
        details = [
            f"{name}: {mine.get(name, 'absent')} here, {reference.get(name, 'absent')} on rank 0" for name in names
        ]
        store.set(f"preflight/difference/{rank}", json.dumps(details))
    found = _differences(store, differing, seconds=min(seconds, 10.0))
    listed = ", ".join(f"{other} ({ranks[other][1]})" for other in differing[:8])
    more = f" and {len(differing) - 8} more" if len(differing) > 8 else ""
    raise UserError(
        f"rank {listed}{more} was started with another configuration than rank 0 ({ranks[0][1]}): {found}; start all "
        "ranks with the same flags, files and package versions"
    )


def _collect(store: Store, world_size: int, seconds: float) -> list[list[str]]:
    deadline = time.monotonic() + seconds
    ranks: list[list[str]] = []
    for other in range(world_size):
        remaining = max(deadline - time.monotonic(), 0.1)
        try:
            store.wait([f"preflight/rank/{other}"], timedelta(seconds=remaining))
        except Exception as error:  # the exception type of a store's timeout differs between stores and torch versions
            missing = [n for n in range(world_size) if not _present(store, n)]
            raise did_not_answer(missing or [other], world_size, seconds) from error
        ranks.append(json.loads(store.get(f"preflight/rank/{other}")))
    return ranks


def _present(store: Store, rank: int) -> bool:
    try:
        return bool(store.check([f"preflight/rank/{rank}"]))
    except Exception:  # the store itself is gone: say that nobody can be seen
        return False


def _differences(store: Store, differing: list[int], seconds: float) -> str:
    key = f"preflight/difference/{differing[0]}"
    try:
        store.wait([key], timedelta(seconds=seconds))
        details = json.loads(store.get(key))
    except Exception:  # the other rank died first; its number is the message then
        return "it did not say in what"
    return "; ".join(details[:5]) + (f"; and {len(details) - 5} more" if len(details) > 5 else "")
