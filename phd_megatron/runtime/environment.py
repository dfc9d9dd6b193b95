"""This process's place among the ranks, from the variables of whatever started it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from phd_megatron.errors import UserError

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class _Launcher:
    """Variables of a program that starts many processes: their number, this one's number, and both on this host."""

    name: str
    world_size: tuple[str, ...]  #: the first that is set counts
    rank: str
    local_rank: str
    local_world_size: str


#: The first whose number of processes is set counts: mpirun inside a Slurm job knows better than Slurm.
_LAUNCHERS = (
    _Launcher(
        "mpirun (Open MPI)",
        ("OMPI_COMM_WORLD_SIZE",),
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    _Launcher(
        "mpirun (MVAPICH2)",
        ("MV2_COMM_WORLD_SIZE",),
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    _Launcher(
        "jsrun", ("JSM_NAMESPACE_SIZE",), "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_SIZE"
    ),
    # MPICH and Intel MPI; Slurm sets these two as well, for its own processes
    _Launcher("mpiexec (PMI)", ("PMI_SIZE",), "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    # Of a step first: srun -n 1 in a job of four tasks is one process.
    _Launcher("srun", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"), "SLURM_PROCID", "SLURM_LOCALID", ""),
)


@dataclass(frozen=True)
class Environment:
    """This process's place, from its launcher's variables, or a world of one without them."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launched: bool = False  #: as one of several, by torchrun or by anything else that sets its variables

    @classmethod
    def read(cls, variables: Mapping[str, str] | None = None) -> Environment:
        """Read the variables that torchrun sets; without them those of srun and mpirun.

        Raises:
            UserError: when some are set and others are missing, or one is not a number; when several processes were
                started that cannot find one another.
        """
        variables = os.environ if variables is None else variables
        if "RANK" not in variables and "WORLD_SIZE" not in variables:
            return _of_another_launcher(variables)
        missing = [name for name in _TORCHRUN if not variables.get(name)]
        if missing:
            given = ", ".join(f"{name}={variables[name]}" for name in _TORCHRUN if variables.get(name))
            raise UserError(
                f"{given} is set but {', '.join(missing)} is not: the ranks cannot find one another; start with "
                "torchrun, or set all four, or unset them for a run of one process"
            )
        try:
            rank, world_size = int(variables["RANK"]), int(variables["WORLD_SIZE"])
            local_rank = int(variables.get("LOCAL_RANK", rank))
            local_world_size = int(variables.get("LOCAL_WORLD_SIZE", world_size))
        except ValueError as error:
            raise UserError(f"RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE must be numbers: {error}") from error
        if not 0 <= rank < world_size:
            raise UserError(f"RANK={rank} is not below WORLD_SIZE={world_size}; ranks count from 0")
        return cls(rank, world_size, local_rank, local_world_size, launched=True)

    def refuse_others(self, command: str) -> None:
        """Raise UserError where this is one of several processes of a command that is for one."""
        if self.world_size > 1:
            raise UserError(f"{command} runs on one process; start it without torchrun")

    def export(self) -> None:
        """Set torchrun's variables where another launcher gave this place; torch's rendezvous reads them."""
        if self.launched and "RANK" not in os.environ:
            os.environ |= {
                "RANK": str(self.rank),
                "WORLD_SIZE": str(self.world_size),
                "LOCAL_RANK": str(self.local_rank),
                "LOCAL_WORLD_SIZE": str(self.local_world_size),
            }


def without_launcher(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables of a process that this one starts itself, alone or under a torchrun of its own."""
    ranks = {
        *_TORCHRUN[:2],
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        *(name for each in _LAUNCHERS for name in each.world_size),
    }
    return {name: value for name, value in variables.items() if name not in ranks}


def _of_another_launcher(variables: Mapping[str, str]) -> Environment:
    for launcher in _LAUNCHERS:
        sizes = [name for name in launcher.world_size if variables.get(name)]
        if sizes:
            break
    else:
        return Environment()
    size_name = sizes[0]
    world_size = _number(variables, size_name)
    if world_size == 1:
        return Environment()
    given = f"{size_name}={variables[size_name]}"
    needed = [launcher.rank, launcher.local_rank, "MASTER_ADDR", "MASTER_PORT"]
    missing = [name for name in needed if not variables.get(name)]
    if missing:
        raise UserError(
            f"{given} is set, as {launcher.name} does for {world_size} processes, but {', '.join(missing)} is not: "
            "each process would be a run of its own, over the same files. Start one task a node with torchrun "
            "(launch_scripts/slurm.sbatch, launch_scripts/pretrain_multi_node.sh); or set MASTER_ADDR and MASTER_PORT "
            f"to the first node and a free port of it, and start all {world_size} processes; or unset {size_name} for "
            "a run of one process"
        )
    rank, local_rank = _number(variables, launcher.rank), _number(variables, launcher.local_rank)
    if not 0 <= rank < world_size:
        raise UserError(f"{launcher.rank}={rank} is not below {given}; ranks count from 0")
    local_world_size = world_size
    if launcher.local_world_size and variables.get(launcher.local_world_size):
        local_world_size = _number(variables, launcher.local_world_size)
    elif variables.get("SLURM_STEP_TASKS_PER_NODE"):  # "4", "4(x2)", "4(x2),3"; the smallest nodes may be last
        first = variables["SLURM_STEP_TASKS_PER_NODE"].split(",")[0].split("(")[0]
        local_world_size = int(first) if first.isdecimal() else world_size
    return Environment(rank, world_size, local_rank, max(local_world_size, local_rank + 1), launched=True)


def _number(variables: Mapping[str, str], name: str) -> int:
    try:
        return int(variables[name])
    except ValueError as error:
        raise UserError(
            f"{name}={variables[name]!r} is not a number of processes; unset it, or set it right"
        ) from error
