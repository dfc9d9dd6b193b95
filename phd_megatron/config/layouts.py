"""Layouts by name: ``tp2+sp+pp2`` is tensor parallelism of 2 with sequence parallelism on 2 pipeline stages."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from phd_megatron.config.catalog import nearest
from phd_megatron.config.schema import ParallelConfig, RunConfig
from phd_megatron.config.serialize import assign
from phd_megatron.errors import UserError

#: words with a number -> the field it is the value of; ``dp`` has none, it is what remains of the world
SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "first": "num_layers_in_first_pipeline_stage",
    "last": "num_layers_in_last_pipeline_stage",
    "dp": "",
}
#: words alone -> the fields they set
SWITCHES: dict[str, dict[str, int | str]] = {
    "sp": {"sequence_parallel": True},
    "overlap": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    "nodist": {"use_distributed_optimizer": False},
    "ag": {"cp_comm_type": "all_gather"},
    "p2p": {"cp_comm_type": "p2p"},
    "recompute": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
#: what a word means, for ``--help``
MEANINGS = {
    "tpN ppN vppN cpN epN etpN dpN": "tensor, pipeline, virtual pipeline, context, expert, expert tensor, data size",
    "firstN lastN": "decoder layers of the first and of the last pipeline stage",
    "sp": "sequence parallelism",
    "overlap": "gradient reduction and parameter gathering overlap with compute",
    "nodist": "no distributed optimizer",
    "ag p2p": "keys and values of other context ranks by all-gather or by a ring",
    "recompute": "full recomputation of activations",
}
#: the default: every feature alone, then the combinations in which they meet; what does not fit a model is left out
COVERING = (
    "tp2",
    "tp2+sp",
    "pp2",
    "dp2",
    "cp2",
    "ep2",
    "dp2+overlap",
    "dp2+nodist",
    "pp2+vpp2",
    "cp2+p2p",
    "tp2+sp+recompute",
    "tp2+pp2",
    "tp2+sp+pp2+vpp2",
    "tp2+sp+dp2+overlap",
    "pp2+vpp2+dp2+overlap",
    "pp4",
    "tp4+sp",
    "tp2+sp+cp2",
    "cp2+pp2",
    "cp4",
    "cp4+p2p",
    "ep2+pp2",
    "tp2+sp+ep2",
    "tp2+sp+etp1+ep2",
    "ep4",
    "cp2+ep2",
    "tp2+sp+pp2+dp2+overlap",
    "tp2+sp+cp2+pp2",
    "tp2+sp+cp2+dp2",
    "pp2+vpp2+cp2+dp2+overlap",
    "tp2+sp+pp2+vpp2+ep2",
    "tp2+sp+pp2+ep4+etp1",
    "dp8+overlap",
)


@dataclass(frozen=True)
class Layout:
    """A name, the fields it sets, and the number of ranks it is run on."""

    name: str
    fields: dict[str, int | str] = field(default_factory=dict)
    ranks: int = 1

    def apply(self, base: RunConfig) -> RunConfig:
        """A copy of ``base`` laid out so; its own layout is forgotten, its device is kept."""
        config = copy.deepcopy(base)
        own = config.parallel
        config.parallel = ParallelConfig(
            device=own.device,
            distributed_timeout_minutes=own.distributed_timeout_minutes,
            ddp_bucket_size=own.ddp_bucket_size,
        )
        config.model.transformer.pop("cp_comm_type", None)
        for name, value in self.fields.items():
            assign(config, name, value)
        return config

    @property
    def group(self) -> int:
        """Data-parallel size x pipeline size: the micro-batches of a step are a multiple of it."""
        pipeline = _size(self.fields, "pp")
        shards = _size(self.fields, "tp") * _size(self.fields, "cp") * pipeline
        return max(1, self.ranks // shards) * pipeline


SINGLE = Layout("single")


def parse_layout(name: str) -> Layout:
    """``tp2+sp`` to a layout. Without ``dpN`` it has the fewest ranks that hold it.

    Raises:
        UserError: for an unknown word, with the nearest one, or a word given twice.
    """
    values: dict[str, int | str] = {}
    dp: int | None = None
    seen: set[str] = set()
    for word in name.split("+"):
        kind, number = _split(word.strip().lower(), name)
        if kind in seen:
            raise UserError(f"layout {name!r} says {kind} twice; give it once")
        seen.add(kind)
        if kind in SWITCHES:
            values.update(SWITCHES[kind])
        elif kind == "dp":
            dp = number
        else:
            values[SIZES[kind]] = number
    if {"ag", "p2p"} <= seen:
        raise UserError(f"layout {name!r} says both ag and p2p; give one of them")
    dense = _size(values, "tp") * _size(values, "cp") * _size(values, "pp")
    # Experts are spread over tensor, context and data ranks together.
    experts = _size(values, "etp", _size(values, "tp")) * _size(values, "ep") * _size(values, "pp")
    return Layout(name, values, dense * dp if dp is not None else math.lcm(dense, experts))


def parse_layouts(text: str) -> list[Layout]:
    """A list with commas, such as ``tp2,tp2+sp``; a layout that is named twice is taken once.

    Raises:
        UserError: as :func:`parse_layout`, or when the list is empty.
    """
    layouts = {name: parse_layout(name) for name in re.split(r"[,\s]+", text.strip()) if name}
    if not layouts:
        raise UserError(f"--layouts {text!r} names no layout; write for example --layouts tp2,tp2+sp,pp2")
    return list(layouts.values())


def covering(max_ranks: int) -> list[Layout]:
    """The default layouts of up to so many ranks."""
    return [layout for layout in map(parse_layout, COVERING) if layout.ranks <= max_ranks]


def microbatches(layouts: Iterable[Layout], at_least: int = 4) -> int:
    """Micro-batches of a step that every one of the layouts can share out evenly, and that fill a pipeline."""
    common = math.lcm(*(layout.group for layout in layouts))
    return common * -(-at_least // common)


def _size(values: Mapping[str, int | str], kind: str, default: int = 1) -> int:
    return int(values.get(SIZES[kind], default))


def _split(word: str, name: str) -> tuple[str, int]:
    if word in SWITCHES:
        return word, 0
    match = re.fullmatch(r"([a-z]+)(\d+)", word)
    if match and match[1] in SIZES and int(match[2]) > 0:
        return match[1], int(match[2])
    digits = re.sub(r"\D", "", word) or "2"
    known = [*(size + digits for size in SIZES), *SWITCHES]
    hint = nearest(word, known) or f"the words are {', '.join([*(size + 'N' for size in SIZES), *SWITCHES])}"
    raise UserError(f"layout {name!r}: {word!r} is no layout word; {hint}")
