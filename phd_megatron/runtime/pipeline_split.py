"""How the decoder layers are cut into pipeline stages and model chunks.

Megatron-Core makes the cut when it builds the model; this says beforehand what it will be, or why it cannot be. A test
holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

from phd_megatron.config.schema import ParallelConfig
from phd_megatron.errors import UserError

_LETTERS = "E is the embedding, t a decoder layer, L the loss, | ends a stage, (...)*n repeats"


@dataclass(frozen=True)
class PipelineSplit:
    """The options that cut a model into ``pp`` stages of ``vpp`` chunks each."""

    pp: int = 1
    vpp: int = 1
    first: int | None = None  #: layers of the first stage, all its chunks together
    last: int | None = None  #: layers of the last stage, all its chunks together
    layout: tuple[str, ...] | None = None  #: letters of each chunk, as ``pipeline_model_parallel_layout``
    embedding: bool = False  #: the embedding counts as a layer
    loss: bool = False  #: the loss counts as a layer

    @classmethod
    def from_config(cls, parallel: ParallelConfig) -> PipelineSplit:
        """Read the options.

        Raises:
            UserError: when they contradict one another.
        """
        pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
        layout = None
        if parallel.pipeline_model_parallel_layout is not None:
            layout = _read_layout(parallel.pipeline_model_parallel_layout, pp, vpp)
            vpp = len(layout) // pp
        split = cls(
            pp=pp,
            vpp=vpp or 1,
            first=parallel.num_layers_in_first_pipeline_stage,
            last=parallel.num_layers_in_last_pipeline_stage,
            layout=layout,
            embedding=parallel.account_for_embedding_in_pipeline_split,
            loss=parallel.account_for_loss_in_pipeline_split,
        )
        split._check_options()
        return split

    @property
    def chunks(self) -> int:
        """Pieces the layers are cut into: pipeline x virtual pipeline."""
        return self.pp * self.vpp

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Decoder layers of each chunk, in the order in which activations pass through them.

        Chunk ``i`` is number ``i // pp`` of pipeline rank ``i % pp``.

        Raises:
            UserError: when ``num_layers`` cannot be cut so.
        """
        if self.layout is not None:
            return self._layers_of_layout(self.layout, num_layers)
        if self.first is not None or self.last is not None:
            return self._uneven_layers(num_layers)
        counted = num_layers + self.embedding + self.loss
        if counted % self.chunks:
            what = f"num_layers {num_layers}"
            if counted > num_layers:
                what += f" + {counted - num_layers} for the embedding and the loss = {counted}"
            raise UserError(
                f"{what} is not divisible by {self._names()} = {self.chunks}: every stage gets as many layers; use "
                f"{-(-counted // self.chunks) * self.chunks - counted + num_layers} layers, another pipeline size, "
                "num_layers_in_first_pipeline_stage / num_layers_in_last_pipeline_stage, or "
                "pipeline_model_parallel_layout"
            )
        sizes = [counted // self.chunks] * self.chunks
        sizes[0] -= self.embedding
        sizes[-1] -= self.loss
        return tuple(sizes)

    def _uneven_layers(self, num_layers: int) -> tuple[int, ...]:
        ends = [size for size in (self.first, self.last) if size is not None]
        middle, stages = num_layers - sum(ends), self.pp - len(ends)
        fits = middle % stages == 0 and middle // stages > 0 if stages else middle == 0
        if not fits:
            rest = f"{stages} other stages of as many layers each" if stages else "no other stage"
            raise UserError(
                f"num_layers_in_first_pipeline_stage {self.first} and num_layers_in_last_pipeline_stage {self.last} "
                f"leave {middle} of num_layers {num_layers} for {rest} (pipeline_model_parallel_size {self.pp}); "
                "change one of them"
            )
        ranks = [middle // stages if stages else 0] * self.pp
        ranks[0] = ranks[0] if self.first is None else self.first
        ranks[-1] = ranks[-1] if self.last is None else self.last
        uneven = next((size for size in ranks if size % self.vpp), None)
        if uneven is not None:
            raise UserError(
                f"a pipeline stage of {uneven} layers is not divisible by virtual_pipeline_model_parallel_size "
                f"{self.vpp}: its model chunks have as many layers each; change the numbers, or use "
                "pipeline_model_parallel_layout"
            )
        return tuple(size // self.vpp for _ in range(self.vpp) for size in ranks)

    def _layers_of_layout(self, layout: tuple[str, ...], num_layers: int) -> tuple[int, ...]:
        sizes = tuple(chunk.count("t") for chunk in layout)
        if sum(sizes) != num_layers:
            raise UserError(
                f"pipeline_model_parallel_layout {'|'.join(layout)} has {sum(sizes)} decoder layers (t) and num_layers "
                f"is {num_layers}; make them equal"
            )
        return sizes

    def _check_options(self) -> None:
        given = {
            "num_layers_in_first_pipeline_stage": self.first,
            "num_layers_in_last_pipeline_stage": self.last,
            "pipeline_model_parallel_layout": self.layout and "|".join(self.layout),
            "account_for_embedding_in_pipeline_split": self.embedding or None,
            "account_for_loss_in_pipeline_split": self.loss or None,
        }
        names = [name for name, value in given.items() if value is not None]
        if names and self.pp == 1:
            raise UserError(
                f"{names[0]} is {given[names[0]]} with pipeline_model_parallel_size 1: there are no stages to cut; "
                "raise the pipeline size or set it to null"
            )
        kinds = {name.split("_")[0] for name in names}  # num_layers_in_*, pipeline_*, account_for_*
        if len(kinds) > 1:
            raise UserError(f"{' and '.join(names)} each say where the layers are cut; give one kind of them")
        for name, size in (("first", self.first), ("last", self.last)):
            if size is not None and size < 1:
                raise UserError(f"num_layers_in_{name}_pipeline_stage is {size}; use 1 or more")

    def _names(self) -> str:
        return f"pipeline {self.pp}" + (f" x virtual pipeline {self.vpp}" if self.vpp > 1 else "")


def _read_layout(text: str, pp: int, vpp: int | None) -> tuple[str, ...]:
    """Letters of each chunk. Megatron-Core's own parser reads the text; what it does not check is checked here."""
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    def refuse(problem: str, cure: str) -> UserError:
        return UserError(f"pipeline_model_parallel_layout {text!r}: {problem}; {cure} ({_LETTERS})")

    try:
        stages = PipelineParallelLayerLayout.parse_str_to_list(text)
    except AssertionError:
        unknown = sorted(set(text) - set("EtmL|()*,0123456789"))
        raise refuse(f"it has {' '.join(map(repr, unknown)) or 'unbalanced parts'}", "correct it") from None
    letters = {"embedding": "E", "decoder": "t", "loss": "L", "mtp": "m"}
    layout = tuple("".join(letters[layer.name] for layer in stage) for stage in stages)
    if "m" in "".join(layout):
        raise refuse("multi-token prediction (m) is not available", "leave m out")
    if len(layout) % pp or (vpp is not None and len(layout) != pp * vpp):
        size = f"pipeline_model_parallel_size {pp}" + (f" x virtual_pipeline_model_parallel_size {vpp}" if vpp else "")
        raise refuse(f"it has {len(layout)} stages, which do not fit {size}", "change one of them")
    if not all(layout):
        raise refuse(f"stage {layout.index('') + 1} is empty and would have no parameters", "give it a layer")
    flat = "".join(layout)
    if flat != "E" + "t" * (len(flat) - 2) + "L":
        raise refuse("it is not one E, then decoder layers, then one L", "correct the order")
    return layout
