"""The parts of a dry run, against loops, formulas and torch's own profiler (real ranks: tests/distributed)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from phd_megatron.cli.plan import run as plan_command
from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import ModelConfig, ParallelConfig, RunConfig
from phd_megatron.errors import UserError
from phd_megatron.planning.flops import forward_flops
from phd_megatron.planning.live import LiveBytes
from phd_megatron.planning.trace import Trace
from phd_megatron.runtime.context import install_backend
from phd_megatron.runtime.dry import dry_tensors, dry_world

MODEL = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "seq_length": 32}
FLAGS = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --train-iters 2 --vocab-size 50"
SEVERAL = "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 --global-batch-size 32"


def make(batch: int = 4, model: dict | None = None, experts: dict | None = None, **layout) -> RunConfig:
    given = {**MODEL, "vocab_size": 50, "make_vocab_size_divisible_by": 16, **(model or {})}
    run = RunConfig(ModelConfig(**given, transformer=experts or {}), ParallelConfig(device="cpu", **layout))
    run.training.micro_batch_size, run.training.global_batch_size, run.training.train_iters = 2, batch, 2
    resolve(run)
    return run


def traced(run: RunConfig, world: int, rank: int, **options):
    install_backend("cpu")
    from phd_megatron.training.dry_run import dry_run

    return dry_run(run, world, rank, **options)


PIPELINE = {"pipeline_model_parallel_size": 2}
VIRTUAL = {**PIPELINE, "virtual_pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("layout", "count", "model"),
    [({}, 7, {}), (PIPELINE, 9, {}), (VIRTUAL, 10, {"num_layers": 4}), ({"overlap_grad_reduce": True}, 5, {})],
    ids=["one stage", "stages", "virtual stages", "overlapped"],
)
def test_further_microbatches_follow_from_few(layout: dict, count: int, model: dict) -> None:
    run = make(batch=4 * count, model=model, **layout)
    world = 2 * run.parallel.pipeline_model_parallel_size
    for rank in range(0, world, 2):
        few, whole = traced(run, world, rank), traced(run, world, rank, whole=True)
        assert max(few.run) < count == whole.microbatches and whole.run == (count,)
        for name in ("collectives", "products", "flops", "held", "peak", "at_peak", "path"):
            assert getattr(few, name) == getattr(whole, name), (rank, name)


def test_products_are_those_of_the_formula() -> None:
    run = make(model={"phd_repeat": 2, "phd_window": 4})
    found = traced(run, 1, 0)
    formula = forward_flops(run.model, 64)
    linear = sum(
        product.flops * calls
        for product, calls in found.products.items()
        if product.what == "gemm" and product.batch == 1 and {product.m, product.k, product.n} & {32, 48, 64, 96}
    )
    assert linear >= 3 * (formula.linear + formula.head) * 4
    original = sum(p.flops * calls for p, calls in found.products.items() if p.what == "attention")
    # Over originals, each copy's queries with those before them.
    assert original == formula.attention_original * 4


def test_a_loss_scale_changes_no_product() -> None:
    """fp16 reads whether gradients overflowed, which they do not, so its step is that of bf16 and updates."""
    found = {}
    for name in ("bf16", "fp16"):
        run = make()
        setattr(run.training, name, True)
        found[name] = traced(run, 2, 0)
    half, scaled = found["bf16"], found["fp16"]
    assert half.products == scaled.products
    # The scale and its counters are some numbers.
    assert 0 < scaled.held["optimizer"] - half.held["optimizer"] < 64


def test_products_that_add_to_a_gradient_buffer_are_counted() -> None:
    """Weight gradients that are added where they are computed are as many operations as those that are added later."""
    fusion = {"gradient_accumulation_fusion": True}
    apart, fused = (traced(make(experts=fields), 1, 0) for fields in ({}, fusion))
    assert apart.flops == fused.flops > 0


def test_ten_thousand_ranks() -> None:
    rank = 5123
    sizes = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "use_distributed_optimizer": True}
    found = traced(make(batch=2 * 5120, **sizes), 10_240, rank)
    shapes = {(row.kind, row.group): (row.size, row.stride, row.link) for row in found.collectives}
    assert shapes["all_gather", "tp"] == (2, 1, "NVLink")
    assert shapes["reduce_scatter", "dp_cp"] == shapes["all_gather", "dp_cp"] == (5120, 2, "network")


def test_the_most_bytes_are_those_of_torchs_profiler() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
    rows = torch.randn(512, 64)
    layers(rows).sum().backward()
    trace = Trace()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, trace, trace.part():
        layers(rows).sum().backward()
    now = most = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    seen = sum(t.numel() * 4 for t in (rows, *layers.parameters()))
    assert most > 512 * 256 * 4
    assert abs(trace.live.most - most) <= seen + 64


def test_storages_are_counted_once_and_until_nothing_holds_them() -> None:
    live = LiveBytes()
    live.kind = "first"
    one = torch.zeros(100)
    for tensor in (one, one.view(10, 10), one[3:]):
        live.see(tensor)
    live.kind = "second"
    other = torch.zeros(50, dtype=torch.float64)
    live.see(other)
    assert live.now == {"first": 400, "second": 400} and live.most == live.total == 800
    del one, tensor
    assert +live.now == {"second": 400}
    assert (live.total, live.most, live.at_most) == (400, 800, {"first": 400, "second": 400})
    other.untyped_storage().resize_(80)
    live.see(other)
    live.rename("second", "third")
    live.restart()
    assert live.most == 80 and live.at_most == {"third": 80}


@pytest.mark.parametrize(("rows", "experts", "topk", "factor"), [(10, 4, 2, 1.0), (7, 8, 3, 1.0), (64, 8, 2, 3.0)])
def test_rows_go_to_experts_in_the_shares_asked_for(rows: int, experts: int, topk: int, factor: float) -> None:
    install_backend("cpu")
    from phd_megatron.model.dry import expert_shares, routing_table

    table = routing_table(rows, topk, expert_shares(experts, topk, range(2), factor))
    assert table.shape == (rows, experts) and table.sum(1).tolist() == [topk] * rows
    even = rows * topk / experts
    for expert, count in enumerate(table.sum(0).tolist()):
        share = factor if expert < 2 else (experts - 2 * factor) / (experts - 2)
        assert abs(count - share * even) <= 1


def test_uneven_experts_compute_more_rows() -> None:
    experts = {"num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 40}
    run = make(experts=experts, expert_model_parallel_size=2)
    even, uneven = (traced(run, 2, 1, imbalance=factor) for factor in (1.0, 1.5))
    of_experts = [
        sum(p.m * calls for p, calls in plan.products.items() if p.k == 32 and p.n == 80) for plan in (even, uneven)
    ]
    assert of_experts[1] == pytest.approx(1.5 * of_experts[0], rel=0.02)
    with pytest.raises(UserError, match=r"--expert-imbalance 5: .* between 1 and 2 times"):
        traced(run, 2, 0, imbalance=5.0)
    with pytest.raises(UserError, match="--expert-imbalance 2: the model has no experts"):
        traced(make(), 2, 0, imbalance=2.0)


def test_what_has_no_values_is_not_guessed() -> None:
    with dry_world(0, 4), dry_tensors():
        with pytest.raises(UserError, match=r"the host reads a value of .*; leave out the options that do so"):
            torch.zeros(3, dtype=torch.int64).sum().item()
        assert float(torch.ones(2).sum()) == 0
    with pytest.raises(UserError, match="--rank 4 is not in a world of 4"), dry_world(4, 4):
        pass
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda run: setattr(run.parallel, "deepspeed", "ds.json"), "leave --deepspeed out"),
        (lambda run: setattr(run.data, "reset_attention_mask", True), "where documents begin"),
        (lambda run: setattr(run.optimizer, "optimizer", "muon"), "use --optimizer adam"),
        (lambda run: run.model.transformer.update(moe_expert_capacity_factor=1.0), "which rows are dropped"),
        (lambda run: run.model.transformer.update(fp8="e4m3"), "traces the CPU path"),
        (lambda run: setattr(run.parallel, "tensor_model_parallel_size", 3), "world size 4"),
    ],
)
def test_what_cannot_be_traced_is_refused(change, words: str) -> None:
    run = make()
    change(run)
    with pytest.raises(UserError, match=words):
        traced(run, 4, 0)


def test_the_command_prints_and_writes_every_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "dry.json"
    words = f"--dry-run --gpus 16 --all-stages --gpus-per-node 4 --json {file} --order {FLAGS} {SEVERAL}"
    assert plan_command(words.split()) == 0
    said = capsys.readouterr().out
    assert "rank 0 of 16: TP 2, PP 2, SP, DP 4, 8 micro-batches" in said and "rank 8 of 16" in said
    assert "CPU path" in said and "cpu flash" in said and "are routed evenly" in said
    found = json.loads(file.read_text("utf-8"))
    assert [plan["rank"] for plan in found["dry_run"]] == [0, 8]
    for plan in found["dry_run"]:
        assert sum(row["flops"] for row in plan["products"]) == plan["flops"]
        assert plan["peak"] == sum(plan["at_peak"].values()) > sum(plan["held"].values())
        links = {row["group"]: row["link"] for row in plan["collectives"]}
        assert links["tp"] == "NVLink" and links["pp"] == links["dp_cp"] == "network"
        assert {event[0] for event in plan["order"]} >= {"gemm", "attention", "all_gather", "reduce_scatter"}
