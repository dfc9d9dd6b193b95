"""CUDA graphs of a step as far as no GPU is needed: what is refused and why, and everything around the recording."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phd_megatron.config.cuda_graph import drop_graph, graph_problems, is_graphed, warm_up_steps
from phd_megatron.config.load import load_run_config
from phd_megatron.config.precision import for_cpu
from phd_megatron.config.resolve import resolve
from phd_megatron.config.resume import check_resume
from phd_megatron.config.schema import ParallelConfig, RunConfig
from phd_megatron.config.serialize import assign
from phd_megatron.errors import UserError
from phd_megatron.runtime.capabilities import Capabilities
from phd_megatron.runtime.context import Runtime, install_backend
from phd_megatron.runtime.implementations import operations
from phd_megatron.runtime.parallel_dims import ParallelDims
from phd_megatron.runtime.requirements import graph_machine_problems, require

HOPPER = Capabilities("cuda", "NVIDIA H100", (9, 0), (12, 9), (2, 11), "")
GRAPH = {"cuda_graph_impl": "local", "cuda_graph_scope": "full_iteration"}
FITTING: dict[str, Any] = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 48, "bf16": True}
FLAGS = ["--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4", "--seq-length", "48"]
VOCAB, BATCH = 50, 2


def make(**values: Any) -> RunConfig:
    """A run that is not resolved."""
    config = RunConfig()
    for name, value in {**FITTING, **values}.items():
        assign(config, name, value)
    return config


def resolved(**values: Any) -> RunConfig:
    config = make(**values)
    resolve(config)
    return config


# ---------------------------------------------------------------- the configuration


def load(*argv: str, saved: Any = None) -> RunConfig:
    install_backend("cpu")  # before Megatron is imported
    from phd_megatron.model.transformer_config import transformer_field_types

    return load_run_config([*FLAGS, *argv], transformer_fields=transformer_field_types(), saved=saved).config


@pytest.mark.parametrize("scope", ["full_iteration", "[full_iteration]"])
def test_megatrons_own_names(scope: str, tmp_path: Path) -> None:
    install_backend("cpu")
    from megatron.core.transformer.enums import CudaGraphScope

    from phd_megatron.model.transformer_config import build_transformer_config

    file = tmp_path / "run.yaml"
    file.write_text(f"model:\n  cuda_graph_impl: local\n  cuda_graph_scope: {scope}\n")
    flags = ["--cuda-graph-impl", "local", "--cuda-graph-scope", scope]
    for config in (load(*flags), load("--config", str(file))):
        resolve(config)
        assert is_graphed(config.model) and warm_up_steps(config.model) == 3
        built = build_transformer_config(config)
        assert built.cuda_graph_scope == [CudaGraphScope.full_iteration]
        assert built.cuda_graph_impl == "none"  # Megatron-Core shall not make graphs beside ours
    assert warm_up_steps(load(*flags, "--cuda-graph-warmup-steps", "5").model) == 5
    assert not is_graphed(load().model)


MOE = {"num_moe_experts": 4, "moe_router_topk": 2}
SHARED = {**MOE, "moe_shared_expert_intermediate_size": 64, "moe_token_dispatcher_type": "alltoall"}
LAYERS = "graphs of single layers are not supported"
INSTEAD = "use cuda_graph_impl local with cuda_graph_scope full_iteration"


@pytest.mark.parametrize(
    ("values", "found", "reason", "cure"),
    [
        ({"cuda_graph_scope": "attn"}, "cuda_graph_impl='local'", LAYERS, INSTEAD),
        ({"cuda_graph_scope": ["full_iteration", "attn"]}, "cuda_graph_impl='local'", LAYERS, INSTEAD),
        ({"cuda_graph_scope": None}, "cuda_graph_impl='local'", LAYERS, INSTEAD),
        ({"cuda_graph_impl": "transformer_engine"}, "cuda_graph_impl='transformer_engine'", LAYERS, INSTEAD),
        ({"cuda_graph_impl": None}, "cuda_graph_scope='full_iteration'", "no effect without cuda_graph_impl", INSTEAD),
        ({"cuda_graph_use_single_mempool": True}, "cuda_graph_use_single_mempool=True", "single layers", "leave it"),
        ({"cuda_graph_warmup_steps": 0}, "cuda_graph_warmup_steps=0", "out of range", "at least 1"),
        ({"hidden_dropout": 0.1}, "hidden_dropout=0.1", "the same values", "use hidden_dropout 0"),
        ({"fp16": True, "bf16": False}, "fp16=True", "the loss scale becomes another tensor", "use bf16"),
        (
            {"rampup_batch_size": [8, 8, 100], "train_samples": 500, "global_batch_size": 16},
            "rampup_batch_size=[8, 8, 100]",
            "the number of micro-batches changes",
            "leave the ramp out",
        ),
        (
            {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
            "recompute_granularity=selective",
            "sets random states",
            "leave it out",
        ),
        ({**MOE, "moe_experts_backend": "te"}, "moe_experts_backend=te", "reads how many rows", "use moe_experts_b"),
        ({**MOE, "moe_experts_backend": "sequential"}, "=sequential", "reads how many rows", "grouped_mm"),
        ({**MOE, "optimizer": "muon"}, "optimizer=muon", "reads how many rows", "cuda_graph_impl none"),
        ({**MOE, "expert_model_parallel_size": 2}, "expert_model_parallel_size=2", "go to each rank", "use 1"),
        ({**MOE, "moe_expert_capacity_factor": 1.0}, "moe_expert_capacity_factor=1.0", "are dropped", "leave it out"),
        ({**MOE, "moe_permute_fusion": True}, "moe_permute_fusion=True", "dispatcher, which reads", "leave it out"),
        ({**SHARED, "moe_shared_expert_overlap": True}, "shared_expert_overlap=True", "which reads", "leave it out"),
        (
            {**MOE, "fp8": "hybrid", "moe_router_padding_for_quantization": True, "moe_experts_backend": "te"},
            "moe_router_padding_for_quantization=True",
            "are added",
            "leave it out",
        ),
        ({"fp8": "hybrid", "fp8_param": True}, "fp8_param=True", "notes in Python", "leave it out"),
        ({"overlap_grad_reduce": True}, "overlap_grad_reduce=True", "a replay skips both", "leave it out"),
        ({"tensor_model_parallel_size": 2}, "tensor_model_parallel_size=2", "inside the graph", "use 1"),
        ({"pipeline_model_parallel_size": 2}, "pipeline_model_parallel_size=2", "inside the graph", "use 1"),
        ({"context_parallel_size": 2}, "context_parallel_size=2", "inside the graph", "use 1"),
    ],
)
def test_what_cannot_be_in_a_graph(values: dict[str, Any], found: str, reason: str, cure: str) -> None:
    with pytest.raises(UserError) as caught:
        resolved(**{**GRAPH, **values})
    message = str(caught.value)
    assert all(words in message for words in (found, reason, cure)), message
    if not found.startswith("cuda_graph"):
        resolved(**values)  # it is the graph that does not go with it


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"bf16": False},
        MOE,
        {**SHARED, "moe_experts_backend": "grouped_mm", "phd_repeat": 2},
        {"phd_repeat": 2, "norm_scheme": "hybrid_star"},
        {"log_layer_statistics": 2, "metrics_file": "x", "eval_interval": 2},
        *[{"fp8": "hybrid", "fp8_recipe": recipe} for recipe in ("delayed", "tensorwise")],
        {"fp8": "e4m3", "fp8_recipe": "blockwise"},
    ],
)
def test_what_can(values: dict[str, Any]) -> None:
    run = resolved(**GRAPH, **values)
    dims = ParallelDims.from_config(run.parallel, 1)
    require(run, dims, HOPPER)
    assert list(graph_machine_problems(run, dims, HOPPER)) == []
    assert {name: run.model.transformer[name] for name in GRAPH} == GRAPH, "it is not switched off"


def machine(run: RunConfig, ranks: int, capabilities: Capabilities) -> str:
    return "\n".join(graph_machine_problems(run, ParallelDims.from_config(run.parallel, ranks), capabilities))


def test_machine_and_layout() -> None:
    run = resolved(**GRAPH)
    assert machine(run, 1, HOPPER) == machine(run, 4, HOPPER) == ""
    message = (
        "cuda_graph_impl=local: CUDA graphs need a CUDA device, and the device is the CPU; use cuda_graph_impl none"
    )
    assert machine(run, 1, Capabilities()) == message
    with pytest.raises(UserError, match="the device is the CPU"):
        require(run, ParallelDims.from_config(run.parallel, 1), Capabilities())
    delayed = resolved(**GRAPH, fp8="hybrid", fp8_recipe="delayed")
    assert machine(delayed, 1, HOPPER) == ""
    assert "fp8_recipe=delayed and data-parallel size 2" in machine(delayed, 2, HOPPER)
    assert machine(resolved(**GRAPH, fp8="hybrid", fp8_recipe="tensorwise"), 2, HOPPER) == ""
    assert machine(resolved(), 1, Capabilities()) == ""
    assert "one by one, for which the host reads" in machine(resolved(**GRAPH, **MOE, bf16=False), 1, HOPPER)
    assert "moe_ffn" not in machine(resolved(**GRAPH, **MOE), 1, HOPPER)
    assert "100 is not a multiple of 8" in machine(resolved(**GRAPH, **MOE, moe_ffn_hidden_size=100), 1, HOPPER)


def test_a_run_goes_on_without_it() -> None:
    """The checkpoint's configuration has one; the CPU, an evaluation and ``none`` do not."""
    saved = resolved(**GRAPH, cuda_graph_warmup_steps=2)
    other = copy.deepcopy(saved)
    assign(other, "cuda_graph_impl", "none")
    assert resolve(other) == [
        "cuda_graph_impl=none: cuda_graph_scope=full_iteration, cuda_graph_warmup_steps=2 left out with it"
    ]
    assert any("cuda_graph_impl: 'local' -> 'none'" in note for note in check_resume(saved, other))
    assert list(graph_problems(other)) == []
    for remove in (for_cpu, drop_graph):
        model = copy.deepcopy(saved).model
        remove(model)
        assert not [name for name in model.transformer if name.startswith("cuda_graph")]
    install_backend("cpu")
    from phd_megatron.config.layouts import Layout
    from phd_megatron.training.evaluation import for_evaluation

    evaluated, _ = for_evaluation(saved, Layout("tp2", {"tensor_model_parallel_size": 2}, 2), "cuda", 2)
    assert not is_graphed(evaluated.model)  # so in a layout that a graph cannot have


def test_the_table_says_so() -> None:
    on_cpu = replace(HOPPER, device="cpu")  # this machine has no other attention
    rows = {row.name: row for row in operations(resolved(**GRAPH), on_cpu)}
    assert rows["training step"].implementation == "CUDA graph of forward and backward"
    assert "recorded after 3 steps" in rows["training step"].reason
    rows = {row.name: row for row in operations(resolved(), on_cpu)}
    assert rows["training step"].reason == "cuda_graph_impl is not set"


# ---------------------------------------------------------------- around the recording


def test_batches_stay_where_they_are() -> None:
    from phd_megatron.training.cuda_graph import StaticBatches

    static = StaticBatches(torch.device("cpu"))

    def drawn(seed: int, columns: int = 3) -> list[dict[str, Tensor]]:
        torch.manual_seed(seed)
        return [{"tokens": torch.randint(9, (2, columns)), "mask": torch.rand(2, columns)} for _ in range(2)]

    first = static.fill(iter(drawn(0)), 2)
    addresses = [x.data_ptr() for batch in first for x in batch.values()]
    again = static.fill(iter(drawn(1)), 2)
    assert [x.data_ptr() for batch in again for x in batch.values()] == addresses
    for batch, given in zip(again, drawn(1), strict=True):
        assert batch["tokens"].data_ptr() != given["tokens"].data_ptr()
        assert all(torch.equal(batch[name], given[name]) for name in given)
    for wrong, count in ((drawn(2, columns=1), 2), (drawn(2), 1)):  # one column would be broadcast
        with pytest.raises(ValueError, match="a CUDA graph holds one form"):
            static.fill(iter(wrong), count)


def test_fp8_weights_are_put_aside() -> None:
    from phd_megatron.training.cuda_graph import weights_put_aside

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    kept = {"weight": torch.ones(1)}
    vars(model[0])["_fp8_workspaces"] = kept
    with pytest.raises(KeyError), weights_put_aside([model]):
        assert vars(model[0])["_fp8_workspaces"] == {}
        vars(model[0])["_fp8_workspaces"]["weight"] = torch.zeros(1)
        raise KeyError
    assert vars(model[0])["_fp8_workspaces"] is kept and float(kept["weight"]) == 1.0
    assert "_fp8_workspaces" not in vars(model[1])


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime.start(ParallelConfig(device="cpu"), verbose=False) as started:
        yield started


@contextmanager
def built(runtime: Runtime, monkeypatch: pytest.MonkeyPatch, graphed: bool) -> Iterator[Any]:
    """A stepper of a small model; a graphed one never records, and has no stream of its own."""
    from phd_megatron.model.build import build_model
    from phd_megatron.training import cuda_graph
    from phd_megatron.training.megatron_engine import MegatronEngine
    from phd_megatron.training.optimizer import build_optimizer, let_go, wrap_data_parallel
    from phd_megatron.training.step import Stepper

    monkeypatch.setattr(cuda_graph, "on_graph_stream", nullcontext)
    run = resolved(phd_repeat=2, phd_window=5, phd_chunk=8, norm_scheme="hybrid_star", train_iters=3)
    models = wrap_data_parallel(build_model(run, VOCAB, runtime.device), run)
    graph = cuda_graph.StepGraph(models, 100, runtime.device, print) if graphed else None
    yield Stepper(MegatronEngine(models, build_optimizer(models, run), graph), runtime.device, BATCH, 48, 2)
    let_go(models)


def batches(step: int, visible: float = 0.5) -> Iterator[dict[str, Tensor]]:
    """Two micro-batches, of which the loss sees about that share."""
    generator = torch.Generator().manual_seed(step)
    for _ in range(2):
        tokens = torch.randint(0, VOCAB, (BATCH, 49), generator=generator)
        positions = torch.arange(48).expand(BATCH, -1)
        mask = (torch.rand(BATCH, 48, generator=generator) < visible).float()
        yield {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "position_ids": positions, "loss_mask": mask}


def gradients(stepper: Any) -> Tensor:
    return torch.cat([buffer.grad_data.flatten() for model in stepper.engine.models for buffer in model.buffers])


def three_steps(stepper: Any) -> list[Tensor]:
    """Gradients, loss, norm and evaluation of each step, then the weights."""
    finalize, seen = stepper.engine.models[0].config.finalize_model_grads_func, []

    def look() -> None:
        seen.append(gradients(stepper).clone())

    for step in range(3):
        result = stepper.train(batches(step), 2, [look], watched=step == 1)
        seen += [result.loss, torch.tensor(result.grad_norm), stepper.evaluate(batches(9), 1, 2)]
    assert stepper.engine.models[0].config.finalize_model_grads_func is finalize
    return seen + [parameter.detach().clone() for model in stepper.engine.models for parameter in model.parameters()]


def test_finalising_after_the_schedule_changes_nothing(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: losses, norms, weights and evaluation of three steps of two micro-batches, one of them watched."""
    with built(runtime, monkeypatch, False) as stepper:
        plain = three_steps(stepper)
    with built(runtime, monkeypatch, True) as stepper:
        apart = three_steps(stepper)
    assert all(torch.equal(one, other) for one, other in zip(plain, apart, strict=True))
    assert 0 < plain[1][1] < 2 * BATCH * 48  # the mask hid some tokens


@pytest.mark.parametrize("visible", [1.0, 0.3, 0.0])
def test_division_by_tokens_is_megatrons(runtime: Runtime, monkeypatch: pytest.MonkeyPatch, visible: float) -> None:
    """Bit for bit, and nothing is divided where the loss sees no token."""
    from megatron.core.distributed import finalize_model_grads as megatrons

    from phd_megatron.model.gradients import finalize_model_grads as ours

    found = []
    with built(runtime, monkeypatch, False) as stepper:
        for finalize in (ours, megatrons):
            stepper.engine.models[0].config.finalize_model_grads_func = finalize
            stepper.engine.forward_backward(stepper._micro_batches(batches(0, visible), 2), False)
            found.append(gradients(stepper).clone())
    assert torch.equal(*found)
    assert bool(found[0].any()) == (visible > 0) and bool(found[0].isfinite().all())
