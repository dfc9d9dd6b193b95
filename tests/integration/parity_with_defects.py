"""The parity command over a training program with defects, each in some layouts only.

Started as a plain program it is the command; torchrun starts it again as the program of the ranks, which then

- do not sum the gradients of the norms shared by tensor-parallel ranks,
- return a gradient that is 0.1 % too large for one parameter, where there are data-parallel ranks,
- end without a word on two pipeline stages, unless these are virtual ones.
"""

import os
import sys
from pathlib import Path

from phd_megatron.runtime.context import install_backend

WRONG = "decoder.layers.1.mlp.linear_fc1.weight"


def break_training() -> None:
    from megatron.core import parallel_state

    from phd_megatron.model import gradients
    from phd_megatron.training import state

    gradients.sum_marked_gradients = lambda model, tp_group: None
    build = state.build_model

    def build_model(run, *rest):
        stages = run.parallel.pipeline_model_parallel_size
        if stages > 1 and run.parallel.virtual_pipeline_model_parallel_size is None:
            os._exit(7)
        models = build(run, *rest)
        if parallel_state.get_data_parallel_world_size() > 1:
            dict(models[0].named_parameters())[WRONG].register_hook(lambda gradient: gradient * 1.001)
        return models

    state.build_model = build_model


if __name__ == "__main__":
    install_backend("cpu")  # before Megatron is imported
    from phd_megatron.cli import main
    from phd_megatron.parity import runs as parity_runs
    from phd_megatron.parity import worker as parity_worker

    if "RANK" in os.environ:
        break_training()
        parity_worker.main(sys.argv[1])
    else:
        parity_runs.WORKER = (str(Path(__file__)),)
        raise SystemExit(main.main(["parity", *sys.argv[1:]]))
