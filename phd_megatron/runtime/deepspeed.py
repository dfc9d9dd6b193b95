"""DeepSpeed as a library: whether it is there, and how it is imported without what would harm a run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
from types import ModuleType

from phd_megatron.config.schema import RunConfig
from phd_megatron.errors import UserError
from phd_megatron.runtime.environment import Environment
from phd_megatron.runtime.mcore_versions import numbers

OLDEST = "0.19.0"
_INSTALL = "DS_BUILD_OPS=0 pip install 'phd-megatron[deepspeed]'"


def require_deepspeed(run: RunConfig) -> None:
    """Refuse a run to be trained by a library that is not there; others read its checkpoints.

    Raises:
        UserError: with the cure.
    """
    if not run.parallel.deepspeed:
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"deepspeed=True, but deepspeed is not installed: {_INSTALL}, or leave --deepspeed out")
    version = importlib.metadata.version("deepspeed")
    if numbers(version) < numbers(OLDEST):
        raise UserError(
            f"deepspeed=True needs deepspeed {OLDEST} or later, and {version} is installed: {_INSTALL}, or leave "
            "--deepspeed out"
        )


def load_deepspeed(on_cpu: bool) -> ModuleType:
    """The package, for a process whose device is known."""
    # Known by other variables where another launcher started this process, and needless to a process alone.
    os.environ.setdefault("LOCAL_RANK", str(Environment.read().local_rank))
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # it would take a GPU that it finds
    import deepspeed
    import deepspeed.comm.torch as communication

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if on_cpu:
        # Its own collectives for one host are compiled when it connects, by one process while the others wait for a
        # lock file, which a process that was killed leaves behind for good. gloo does what they do.
        communication.build_shm_op = lambda: None
    return deepspeed
