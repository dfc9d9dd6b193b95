"""The cut of layers into chunks is Megatron-Core's own; what it cannot make is refused with the numbers."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from phd_megatron.config.schema import ParallelConfig
from phd_megatron.errors import UserError
from phd_megatron.runtime.pipeline_split import PipelineSplit

SIZES = {"pp": "pipeline_model_parallel_size", "vpp": "virtual_pipeline_model_parallel_size"}
SIZES |= {"first": "num_layers_in_first_pipeline_stage", "last": "num_layers_in_last_pipeline_stage"}
SIZES |= {"layout": "pipeline_model_parallel_layout"}
SIZES |= {"embedding": "account_for_embedding_in_pipeline_split", "loss": "account_for_loss_in_pipeline_split"}


def parallel(**values: object) -> ParallelConfig:
    return ParallelConfig(**{SIZES[name]: value for name, value in values.items()})


@pytest.mark.parametrize(
    ("layers", "values", "expected"),
    [
        (4, {}, (4,)),
        (4, {"pp": 2}, (2, 2)),
        (8, {"pp": 2, "vpp": 2}, (2, 2, 2, 2)),
        (5, {"pp": 2, "first": 2}, (2, 3)),
        (7, {"pp": 4, "last": 1}, (2, 2, 2, 1)),
        (7, {"pp": 3, "first": 1, "last": 2}, (1, 4, 2)),
        (10, {"pp": 3, "vpp": 2, "first": 2, "last": 4}, (1, 2, 2, 1, 2, 2)),
        (3, {"pp": 2, "loss": True}, (2, 1)),
        (2, {"pp": 3, "loss": True}, (1, 1, 0)),
        (6, {"pp": 2, "vpp": 2, "embedding": True, "loss": True}, (1, 2, 2, 1)),
        (3, {"pp": 2, "vpp": 2, "loss": True}, (1, 1, 1, 0)),
        (5, {"pp": 2, "layout": "Et|ttttL"}, (1, 4)),
        (4, {"pp": 2, "layout": "Ett|tt|L|", "vpp": None}, None),
        (4, {"pp": 2, "layout": "E|tt|tt|L"}, (0, 2, 2, 0)),
        (6, {"pp": 2, "layout": "Et*3|(t|)*2tL"}, (3, 1, 1, 1)),
    ],
)
def test_split_is_megatrons(layers: int, values: dict[str, object], expected: tuple[int, ...] | None) -> None:
    if expected is None:
        with pytest.raises(UserError, match="empty"):
            PipelineSplit.from_config(parallel(**values))
        return
    split = PipelineSplit.from_config(parallel(**values))
    assert split.layers(layers) == expected
    if split.pp > 1:
        assert megatrons(split, layers, values.get("layout")) == expected


def megatrons(split: PipelineSplit, layers: int, layout: object) -> tuple[int, ...]:
    """Layers of each chunk and their first numbers, asked from Megatron-Core chunk by chunk."""
    from megatron.core import parallel_state
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    vpp = split.vpp if split.vpp > 1 else None
    config = SimpleNamespace(
        num_layers=layers,
        pipeline_model_parallel_size=split.pp,
        virtual_pipeline_model_parallel_size=vpp,
        num_layers_in_first_pipeline_stage=split.first,
        num_layers_in_last_pipeline_stage=split.last,
        account_for_embedding_in_pipeline_split=split.embedding,
        account_for_loss_in_pipeline_split=split.loss,
        pipeline_model_parallel_layout=PipelineParallelLayerLayout(layout, split.pp) if layout else None,
    )
    sizes, offsets = [], []
    parallel_state.set_virtual_pipeline_model_parallel_world_size(vpp)
    try:
        for chunk in range(split.chunks):
            stage = None if vpp is None else chunk // split.pp
            parallel_state.set_pipeline_model_parallel_rank(chunk % split.pp)
            sizes.append(get_num_layers_to_build(config, stage, chunk % split.pp))
            offsets.append(get_transformer_layer_offset(config, stage, chunk % split.pp))
    finally:
        parallel_state.set_virtual_pipeline_model_parallel_world_size(None)
        parallel_state.set_pipeline_model_parallel_rank(None)
    assert offsets == [sum(sizes[:number]) for number in range(len(sizes))]
    return tuple(sizes)


@pytest.mark.parametrize(
    ("layers", "values", "message"),
    [
        (5, {"pp": 2}, "num_layers 5 is not divisible by pipeline 2 = 2"),
        (6, {"pp": 2, "vpp": 2}, "pipeline 2 x virtual pipeline 2 = 4"),
        (4, {"pp": 2, "loss": True}, "num_layers 4 + 1 for the embedding and the loss = 5"),
        (4, {"pp": 2, "first": 4}, "leave 0 of num_layers 4 for 1 other stages"),
        (4, {"pp": 2, "first": 1, "last": 2}, "leave 1 of num_layers 4 for no other stage"),
        (6, {"pp": 2, "vpp": 2, "first": 3}, "a pipeline stage of 3 layers is not divisible"),
        (6, {"first": 3}, "there are no stages to cut"),
        (6, {"pp": 2, "first": 3, "loss": True}, "give one kind"),
        (6, {"pp": 2, "first": 0}, "num_layers_in_first_pipeline_stage is 0"),
        (4, {"pp": 2, "layout": "Ett|ttt|L"}, "it has 3 stages, which do not fit pipeline_model_parallel_size 2"),
        (4, {"pp": 2, "vpp": 2, "layout": "Ett|ttL"}, "virtual_pipeline_model_parallel_size 2"),
        (4, {"pp": 2, "layout": "Ett|tL"}, "has 3 decoder layers (t) and num_layers is 4"),
        (4, {"pp": 2, "layout": "Ett|ttmL"}, "multi-token prediction"),
        (4, {"pp": 2, "layout": "Etx|ttL"}, "it has 'x'"),
        (4, {"pp": 2, "layout": "tE|ttL"}, "not one E, then decoder layers, then one L"),
    ],
)
def test_what_cannot_be_cut_is_refused(layers: int, values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        PipelineSplit.from_config(parallel(**values)).layers(layers)
