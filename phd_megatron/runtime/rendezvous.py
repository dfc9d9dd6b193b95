"""The ranks of one start find one another, and make sure that they mean the same run."""

from __future__ import annotations

import itertools
import os
import sys
from datetime import timedelta
from typing import TYPE_CHECKING

from phd_megatron.config.plain import Values
from phd_megatron.errors import UserError
from phd_megatron.runtime.environment import Environment
from phd_megatron.runtime.launcher import launcher_is_gone
from phd_megatron.runtime.meeting import meet
from phd_megatron.runtime.preflight import compare_ranks

if TYPE_CHECKING:
    from torch.distributed import Store

_STARTS = itertools.count()


def rendezvous(environment: Environment, timeout: timedelta, config: Values | None) -> tuple[Store, int, int]:
    """A store that the ranks of this start share, this rank, and their number.

    Raises:
        UserError: ranks do not come, or have another run in mind.
    """
    import torch
    import torch.distributed as dist

    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if launcher_is_gone(os.environ):
        raise UserError(
            f"nobody serves {address} any more: the torchrun that rank 0 belongs to has ended; start the run again"
        )
    try:
        store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    except Exception as error:  # DistStoreError, DistNetworkError, RuntimeError by torch version
        raise UserError(
            f"rank {environment.rank} of {environment.world_size} did not reach the others at {address} within "
            f"{timeout.total_seconds() / 60:g} minutes ({type(error).__name__}: {error}); check that all ranks were "
            "started and that the address and port are theirs"
        ) from error
    seconds = min(timeout.total_seconds(), 300.0)
    # A process may start several runtimes one after the other (parity does): each gets its own keys.
    store = dist.PrefixStore(f"phd_megatron/{next(_STARTS)}", store)
    store = dist.PrefixStore(meet(store, rank, world_size, seconds), store)
    compare_ranks(store, rank, world_size, config, _versions(str(torch.__version__)), seconds)
    return store, rank, world_size


def _versions(torch_version: str) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {"torch": torch_version, "python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for package in ("megatron-core", "phd-megatron"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions
