"""The runs that are hit: a tiny model under several parallel layouts."""

from __future__ import annotations

from dataclasses import dataclass

Options = dict[str, object]

#: steps that the undisturbed run of a layout makes; a run that comes near its end is begun anew
STEPS = 120
SAVE_INTERVAL = 2

_MODEL: Options = {
    **{"num-layers": 4, "hidden-size": 32, "ffn-hidden-size": 48, "num-attention-heads": 4, "num-query-groups": 2},
    **{"seq-length": 24, "make-vocab-size-divisible-by": 16, "norm-scheme": "hybrid_star"},
}
_PHD: Options = {"phd-repeat": 2, "phd-window": 5, "phd-chunk": 8}
_EXPERTS: Options = {
    **{"num-experts": 4, "moe-router-topk": 2, "moe-ffn-hidden-size": 24, "moe-router-dtype": "fp32"},
    **{"moe-router-load-balancing-type": "aux_loss", "moe-aux-loss-coeff": 0.01},
    **{"moe-token-dispatcher-type": "alltoall", "expert-model-parallel-size": 2},
}
_RUN: Options = {
    **{"micro-batch-size": 2, "global-batch-size": 4, "train-iters": 1000, "eval-iters": 0, "log-interval": 1},
    **{"device": "cpu", "lr": 1e-2, "progress": "off"},
}
_OVERLAP: Options = {"overlap-grad-reduce": True, "overlap-param-gather": True}


@dataclass(frozen=True)
class Layout:
    """One way to run the model.

    Args:
        ranks: processes under torchrun.
        options: of ``pretrain``, on top of the model's.
        background: checkpoints are written in the background.
    """

    name: str
    ranks: int
    options: Options
    background: bool = False

    def command(self, data: str) -> list[str]:
        """Words after ``pretrain`` that say what is trained; where it saves is not among them."""
        return flags({**_MODEL, **_RUN, "data-path": data, **self.options})

    def saving(self) -> list[str]:
        """Words that say how often it saves; what is computed does not depend on them."""
        return flags(
            {"save-interval": SAVE_INTERVAL, "keep-last": 2, **({"async-save": True} if self.background else {})}
        )


def flags(values: Options) -> list[str]:
    """``{"a": 1, "b": True}`` to ``["--a", "1", "--b"]``."""
    words: list[str] = []
    for name, value in values.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


_TP: Options = {"tensor-model-parallel-size": 2, "sequence-parallel": True}
_PP: Options = {"pipeline-model-parallel-size": 2}
_ALL = [
    Layout("1 rank, K=2", 1, _PHD),
    Layout("DP2, async save", 2, {**_PHD, **_OVERLAP}, background=True),
    Layout("DP2, K=2", 2, {**_PHD, **_OVERLAP}),
    Layout("TP2+SP, K=2", 2, {**_PHD, **_TP}),
    Layout("PP2", 2, _PP),
    Layout("CP2, K=2", 2, {**_PHD, "context-parallel-size": 2}),
    Layout("EP2", 2, _EXPERTS),
    Layout("VPP2, async save", 2, {**_PP, "num-layers-per-virtual-pipeline-stage": 1}, background=True),
]
LAYOUTS = {layout.name: layout for layout in _ALL}
