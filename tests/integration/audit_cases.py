"""``run_cases.py`` that looks at every parameter after a run is built and before it trains.

The argument is a JSON file with a list of [directory, argument list of ``phd-megatron pretrain``]. Each rank writes
``DIRECTORY/rank_<n>.json``, one row a parameter slice, and the slices' initial values beside it as safetensors.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import is_main_replica
from safetensors.torch import save_file

from phd_megatron.cli.main import main
from phd_megatron.model.initialisation import sharded_tensors
from phd_megatron.training.pretrain import Trainer


def in_clip_norm(trainer: Trainer, parameters: list[Any]) -> set[int]:
    """Numbers of the parameters whose gradients this rank adds up for the clip norm: planted gradients are found."""
    trainer.state.models[0].zero_grad_buffer()
    for number, parameter in enumerate(parameters, 1):
        parameter.main_grad.fill_(number)
    found = set()
    for part in trainer.state.optimizer.chained_optimizers:
        part._copy_model_grads_to_main_grads()
        found |= {int(gradient.flatten()[0]) - 1 for gradient in part.get_main_grads_for_grad_norm()}
    trainer.state.optimizer.zero_grad()
    trainer.state.models[0].zero_grad_buffer()
    return found


def is_decayed(trainer: Trainer, parameter: Any) -> bool:
    for part in trainer.state.optimizer.chained_optimizers:
        if parameter in part.model_param_group_index_map:
            group, _ = part.model_param_group_index_map[parameter]
            return bool(part.optimizer.param_groups[group]["wd_mult"] > 0)
    raise AssertionError("a parameter that no optimizer has")


def owner(data: torch.Tensor, parameters: list[Any]) -> int:
    """Number of the parameter whose memory ``data`` is, or is a part of."""
    for number, parameter in enumerate(parameters):
        if 0 <= data.data_ptr() - parameter.data_ptr() < parameter.numel() * parameter.element_size():
            return number
    raise AssertionError("a sharded tensor shares no memory with a parameter")


def audit(trainer: Trainer, directory: Path) -> None:
    module: Any = trainer.state.models[0].module
    parameters = list(module.parameters())
    counted = in_clip_norm(trainer, parameters)
    rows, values = [], {}
    for part in sharded_tensors(module, trainer.stepper.groups.dp_cp):
        number = owner(part.data, parameters)
        values[str(len(rows))] = part.data.detach().clone()
        rows.append(
            {
                "key": part.key,
                "shape": list(part.global_shape),
                "offset": list(part.global_offset),
                "main": is_main_replica(part.replica_id),
                "counted": number in counted,
                "decayed": is_decayed(trainer, parameters[number]),
                "parameter": number,
            }
        )
    assert {row["parameter"] for row in rows} == set(range(len(parameters))), "a parameter that no checkpoint holds"
    directory.mkdir(parents=True, exist_ok=True)
    save_file(values, directory / f"rank_{trainer.runtime.rank}.safetensors")
    (directory / f"rank_{trainer.runtime.rank}.json").write_text(json.dumps(rows))


train = Trainer.train
for target, argv in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):

    def audited(self: Trainer, *args: Any, _target: str = target) -> str:
        audit(self, Path(_target))
        return train(self, *args)

    Trainer.train = audited  # type: ignore[method-assign]
    if code := main(argv):
        raise SystemExit(f"{' '.join(argv)} ended with {code}")
