"""How members of a sweep are started, and what plans assume."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from phd_megatron.config.catalog import nearest
from phd_megatron.config.plain import Values
from phd_megatron.config.values import check_value
from phd_megatron.errors import UserError
from phd_megatron.planning.peak import ASSUMED_DEVICE, ASSUMED_MFU, PEAK_TFLOPS

Options = TypeVar("Options")


@dataclass(frozen=True)
class Launcher:
    """The section ``launcher`` of a sweep file."""

    kind: Literal["local", "slurm", "print"] = "local"  #: run here, submit a SLURM array, or print commands
    parallel: int = 1  #: members at once (SLURM: at most)
    ranks: int = 1  #: processes of a member on each node; above 1 they are started by torchrun
    members_per_device: int = 1  #: local: members at once that share their CUDA devices, for small ones
    nodes: int = 1  #: nodes of a member; above 1 with SLURM only
    threads: int | None = None  #: CPU threads of a process; default the cores divided by all processes at once
    slurm_options: list[str] = field(default_factory=list)  #: further lines, such as "--partition=gpu"

    def check(self) -> Launcher:
        """The same.

        Raises:
            UserError: for a number below 1, or several nodes without SLURM.
        """
        for name in ("parallel", "ranks", "members_per_device", "nodes", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"launcher: {name}={value} is out of range; use a value at least 1")
        if self.nodes > 1 and self.kind == "local":
            raise UserError(
                f"launcher: nodes={self.nodes} with kind=local: a member runs on this node; use kind: slurm"
            )
        return self


@dataclass(frozen=True)
class Planning:
    """The section ``planning``: the device that hours are of."""

    peak_tflops: float = PEAK_TFLOPS[ASSUMED_DEVICE]  #: TFLOP/s of one device, dense
    mfu: float = ASSUMED_MFU  #: share of it that is reached; an assumption until it is measured


def read_options(cls: type[Options], data: Values, where: str) -> Options:
    """An options record from a mapping.

    Raises:
        UserError: for an unknown name or a value of the wrong type.
    """
    annotations = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name in data:
        if name not in names:
            raise UserError(
                f"{where}: unknown option {name!r}; {nearest(str(name), names) or 'use ' + ', '.join(names)}"
            )
    return cls(**{name: check_value(name, value, annotations[name], where) for name, value in data.items()})
