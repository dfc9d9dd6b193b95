"""An error that all ranks of a job run into is printed by one of them.

Ranks refuse a run before they are connected, so they settle who speaks through torchrun's own store. It belongs to the
launcher and is there before the first rank and after the last one. Without it, or in doubt, a rank prints: a message
may appear twice, but is never lost.
"""

from __future__ import annotations

import hashlib
import os
from datetime import timedelta
from typing import TYPE_CHECKING

from phd_megatron.console.terminal import warn

if TYPE_CHECKING:
    from torch.distributed import Store

_WAIT = timedelta(seconds=5)


def say_once(message: str) -> None:
    """Print ``message`` on stderr, unless another rank of this job has printed the same one."""
    store = _launcher_store()
    key = hashlib.sha256(message.encode("utf-8", "replace")).hexdigest()
    if store is not None and _is_said_by_another(store, key):
        return
    # One write: under torchrun's -u print makes two, and what another rank says gets between a line and its end.
    warn(message)
    if store is not None:
        try:
            store.set(f"{key}/done", "1")
        except Exception:  # the launcher is gone, and the other ranks with it
            return


def _is_said_by_another(store: Store, key: str) -> bool:
    try:
        if store.add(key, 1) == 1:
            return False
        # This rank's exit makes the launcher stop the others, so the message must be out before.
        store.wait([f"{key}/done"], _WAIT)
        return True
    except Exception:  # what a store raises differs between torch versions
        return False


def _launcher_store() -> Store | None:
    variables = os.environ
    if variables.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or variables.get("WORLD_SIZE", "1") == "1":
        return None
    try:
        from torch.distributed import PrefixStore, TCPStore

        host, port = variables["MASTER_ADDR"], int(variables["MASTER_PORT"])
        store = TCPStore(host, port, is_master=False, timeout=_WAIT, wait_for_workers=False)
    except Exception:  # no torch, a malformed variable, or nobody listens
        return None
    start = f"{variables.get('TORCHELASTIC_RUN_ID')}/{variables.get('TORCHELASTIC_RESTART_COUNT')}"
    return PrefixStore(f"phd_megatron/said/{start}", store)
