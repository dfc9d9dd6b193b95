"""``phd-megatron bench``: it checks before it times, and says what it cannot do."""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
from pathlib import Path

import pytest
import torch

from phd_megatron.bench import arguments as bench_arguments
from phd_megatron.bench import attention as bench_attention
from phd_megatron.bench import members as bench_members
from phd_megatron.bench import train as bench_train
from phd_megatron.bench.timing import BOTH, FORWARD, Contender, differentiable, measure
from phd_megatron.cli import bench
from phd_megatron.cli.main import main
from phd_megatron.config.cuda_graph import is_graphed, warm_up_steps
from phd_megatron.errors import UserError
from phd_megatron.kernels.phd_attention import BACKENDS
from phd_megatron.model.gpt_model import PHDGPTModel
from phd_megatron.phd.kv_policy import KVPolicy

SMALL = ["attention", "--seq-length", "48", "--heads", "4", "--head-dim", "16", "--rounds", "1", "--device", "cpu"]


def test_attention_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "bench.json"
    assert main(["bench", *SMALL, "--json", str(target)]) == 0
    (result,) = json.loads(target.read_text(encoding="utf-8"))["results"]
    rows = {row["name"]: row for row in result["rows"]}
    assert result["shape"]["policy"] == "PHD-CSWA-2-16-32"
    assert list(rows) == [
        "vanilla causal SDPA",
        "floor: 2 x vanilla",
        "PHD sdpa",
        "PHD reference",
        "dense-mask SDPA over K*s",
        "naive repetition, causal over K*s",
    ]
    floor, vanilla = rows["floor: 2 x vanilla"], rows["vanilla causal SDPA"]
    assert floor["milliseconds"] == pytest.approx(2 * vanilla["milliseconds"])
    assert floor["ratio_to_floor"] == 1.0 and vanilla["cpu_ratio_to_floor"] == pytest.approx(0.5)
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)
    assert "sdpa against the dense-mask definition" in printed and "PHD flex is not timed" in printed


def test_vendors_operators_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each that is asked for is held to the definition, then timed for vanilla and for the backends that take it."""
    monkeypatch.setenv("PHD_CAUSAL_KERNEL", "cpu flash")
    target = tmp_path / "bench.json"
    words = ["--backends", "sdpa", "reference", "--causal-kernels", "cpu flash", "--only-phd", "--json", str(target)]
    assert main(["bench", *SMALL, *words]) == 0
    (result,) = json.loads(target.read_text(encoding="utf-8"))["results"]
    names = ["vanilla causal SDPA", "vanilla causal SDPA, ours by cpu flash", "floor: 2 x vanilla"]
    assert [row["name"] for row in result["rows"]] == [*names, "PHD sdpa", "PHD sdpa, cpu flash", "PHD reference"]
    assert os.environ["PHD_CAUSAL_KERNEL"] == "cpu flash"  # as it was
    with bench_attention._part_a("another"):
        assert os.environ["PHD_CAUSAL_KERNEL"] == "another"


def test_a_variant_that_cannot_run_is_noted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    genuine = bench_attention._worst_error

    def error(case: bench_attention.Case, way: bench_attention.Way) -> float:
        if way.options:
            raise RuntimeError("it needs a package\nthat is not here")
        return genuine(case, way)

    monkeypatch.setattr(bench_attention, "_worst_error", error)
    row = BACKENDS["sdpa"]._replace(variants=({"fancy": True},))
    monkeypatch.setitem(BACKENDS, "sdpa", row)
    assert bench.run([*SMALL, "--backends", "sdpa", "--only-phd"]) == 0
    assert "PHD sdpa, fancy=True is not timed: it needs a package\n" in capsys.readouterr().out


def test_a_sweep_as_csv_and_plot(tmp_path: Path) -> None:
    table, plot = tmp_path / "bench.csv", tmp_path / "plots" / "bench.svg"
    sweep = ["--seq-length", "16", "32", "--repeat", "1", "2", "--only-phd", "--csv", str(table), "--plot", str(plot)]
    assert bench.run([*SMALL, *sweep]) == 0
    lines = list(csv.DictReader(table.open(encoding="utf-8")))
    shapes = {(line["repeat"], line["seq_length"]) for line in lines}
    assert shapes == {(k, s) for k in "12" for s in ("16", "32")}
    assert all(float(line["milliseconds"]) > 0 and float(line["tflops"]) > 0 for line in lines)
    assert plot.stat().st_size > 1000


def test_what_is_timed_is_the_function() -> None:
    calls, x = [], torch.ones(2, requires_grad=True)

    def square() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return x * x

    timed = differentiable("square", square, [x], torch.ones(2))
    timed.steps[FORWARD]()
    timed.steps[BOTH]()
    assert calls == [False, True]


def test_what_steps_leave_is_reset_around_each_round_and_not_timed() -> None:
    said: list[str] = []
    contender = Contender("a", {"step": lambda: said.append("step")}, reset=lambda: said.append("reset"))
    measure([contender], 2, torch.device("cpu"))
    assert said == ["reset", "step", "reset"] * 3 and len(contender.times["step"]) == 2


def test_useful_flops() -> None:
    policy = KVPolicy(2, 1)
    contender = Contender("PHD sdpa", {}, {"forward": [1.0], "forward + backward": [2.0]})
    vanilla = Contender("vanilla causal SDPA", {}, contender.times, contender.times)
    args = argparse.Namespace(batch=1, heads=3, kv_heads=1)
    contender.cpu_times = contender.times
    rows = bench_attention._result(policy, args, 2, 8, [vanilla, contender], on_cuda=False).rows
    pairs = 2 * 3 + 2  # both copies over 1 + 2 originals, and each hidden token over itself
    assert rows[-1].numbers["forward_tflops"] == pytest.approx(4 * 8 * 3 * pairs / 1e9)
    assert rows[-1].numbers["tflops"] == pytest.approx(14 * 8 * 3 * pairs / 2e9)


@pytest.mark.parametrize(
    "argv",
    [
        ["decode", "--kv-length", "20", "40", "--repeat", "1", "3", "--heads", "4", "--kv-heads", "2"],
        ["norm-rope", "--rows", "12", "--norms", "qk", "qkv", "--heads", "4", "--kv-heads", "2"],
    ],
    ids=lambda argv: argv[0],
)
def test_small_benches(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "bench.json"
    common = ["--head-dim", "16", "--rounds", "1", "--device", "cpu", "--json", str(target)]
    assert bench.run([*argv, *common]) == 0
    results = json.loads(target.read_text(encoding="utf-8"))["results"]
    assert len(results) == 2
    assert all(row["milliseconds"] > 0 and row["share_of_copy"] > 0 for result in results for row in result["rows"])
    assert "the Triton kernel is not timed: " in capsys.readouterr().out


DOCUMENTS = ["documents", "--seq-length", "64", "--mean-document-length", "9", "--heads", "4", "--kv-heads", "2"]


def test_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "bench.json"
    common = ["--batch", "2", "--head-dim", "16", "--rounds", "1", "--device", "cpu", "--json", str(target)]
    assert bench.run([*DOCUMENTS, *common]) == 0
    (result,) = json.loads(target.read_text(encoding="utf-8"))["results"]
    one, alone, apart = result["rows"]
    assert one["over_one"] == one["share_of_pairs"] == alone["share_of_pairs"] == 1
    assert one["documents"] == alone["documents"] == 2 and 2 < apart["documents"] < 40
    assert 0.05 < apart["share_of_pairs"] < 0.6 and apart["milliseconds"] > 0
    assert bench.run([*DOCUMENTS, *common[:-2], "--fail-above", "1e-9"]) == 1
    assert "more than 1e-09 times their share" in capsys.readouterr().out


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_attention, "_worst_error", lambda *_: float("nan"))
    assert bench.run(SMALL) == 1
    assert "not timed" in capsys.readouterr().out


def test_fail_above(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.run([*SMALL, "--only-phd", "--chunk", "0", "--fail-above", "1e-9"]) == 1
    assert "--fail-above" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["atention"], "'attention'"),
        (["attention", "--heads", "3"], "multiple of --kv-heads 2"),
        (["attention", "--rounds", "0"], "--rounds 0"),
        (["attention", "--window", "0"], "phd_window=0"),
        (["attention", "--backends", "flex", "--device", "cpu"], "no backward on cpu"),
        (
            ["attention", "--causal-kernels", "cudnn", "--device", "cpu"],
            "--causal-kernels: cudnn is no operator for cpu",
        ),
        (["decode", "--kv-length", "5", "0"], "--kv-length 0"),
        (["norm-rope", "--norms", "qc"], "--norms qc"),
        (["attention", "--device", "abacus"], "abacus"),
    ],
)
def test_refusals(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=message):
        bench.run(argv)
    assert main(["bench", *argv]) == 2
    assert "error: " in capsys.readouterr().err


def test_help_lists_only_what_is_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(bench.BENCHES, "nothing_yet", "a measurement without a module")
    assert bench.run(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "attention" in printed and "nothing_yet" not in printed


def test_members_of_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "members.json"
    words = ["--preset", "tiny-dense", "--members", "vanilla", "K=3+hybrid_star", "--rounds", "1", "--device", "cpu"]
    options = "--vocab-size 300 --num-layers 2 --seq-length 64 --hidden-size 32 --ffn-hidden-size 64 --kv-channels 8"
    gc.collect()  # what other tests left goes now, and not in between
    before = sum(isinstance(x, PHDGPTModel) for x in gc.get_objects())
    assert main(["bench", "train", *words, "--options", options, "--json", str(target)]) == 0
    assert sum(isinstance(x, PHDGPTModel) for x in gc.get_objects()) == before  # each was freed before the next
    first, second, again = json.loads(target.read_text(encoding="utf-8"))["members"]
    assert [first["name"], second["name"], again["name"]] == ["vanilla", "K=3+hybrid_star", "vanilla"]
    assert again["loss"] == first["loss"] != second["loss"]
    assert 1.5 < second["flops"] / first["flops"] < 3  # three copies, fewer in the pruned last layer and the head
    assert (first["copies"], second["copies"]) == (1, 3) and first["breakdown"]["GEMM"] > 0
    printed = capsys.readouterr().out
    assert "original tokens/s" in printed and "milliseconds of one profiled step" in printed


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_steps_are_timed_only_where_losses_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], factor: float
) -> None:
    """Against Hugging Face's with the same weights, or with others."""
    weights = bench_train._our_weights
    monkeypatch.setattr(
        bench_train, "_our_weights", lambda config: {name: factor * value for name, value in weights(config).items()}
    )
    words = ["--seq-length", "32", "--micro-batch-size", "1", "--rounds", "1", "--device", "cpu"]
    code = main(["bench", "train", *words, "--json", str(tmp_path / "times.json")])
    said = capsys.readouterr()
    assert code == (0 if factor == 1 else 2)
    assert ("so a timing would compare different things" in said.err) is (factor != 1)
    assert (tmp_path / "times.json").exists() is (factor == 1)


def test_a_member_is_a_cuda_graph(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--preset", "tiny-dense", "--options", "--vocab-size 300", "--device", "cpu", "--members", "K=2+graph"]
    model = bench_members._configure(bench_arguments.parser("members").parse_args(words), "K=2+graph").model
    assert model.phd_repeat == 2 and is_graphed(model)
    other = ["--preset", "dense-1.2b", "--members", "tensorwise+graph"]  # overlaps communication, which graphs cannot
    args = bench_arguments.parser("members").parse_args(other)
    assert is_graphed(bench_members._configure(args, "tensorwise+graph").model)
    assert warm_up_steps(model) == 2  # the third step is recorded, and the fourth is timed
    assert main(["bench", "train", *words]) == 1
    assert "K=2+graph was not measured: cuda_graph_impl=local: CUDA graphs need a" in capsys.readouterr().out


def test_members_are_configured_and_named() -> None:
    words = ["--preset", "tiny-moe", "--options", "--vocab-size 300 --bf16", "--accumulate", "3"]
    args = bench_arguments.parser("members").parse_args(words)
    model = bench_members._configure(args, "K=2+hybrid_star").model
    assert (model.phd_repeat, model.norm_scheme) == (2, "hybrid_star")
    assert bench_members._configure(args, "vanilla").training.global_batch_size == 3
    assert "moe_router_padding_for_quantization" not in model.transformer
    assert is_graphed(bench_members._configure(args, "vanilla+graph").model)
    with pytest.raises(UserError, match=r"moe_experts_backend=sequential: the host reads how many rows"):
        bench_members._configure(args, "sequential+graph")
    for name in ("te", "te+tensorwise", "tensorwise"):
        model = bench_members._configure(args, name).model
        assert model.moe_experts_backend == ("te" if "te" in name.split("+") else "auto")
        assert ("moe_router_padding_for_quantization" in model.transformer) == (name == "te+tensorwise")
    with pytest.raises(UserError, match="'K=9' is none of vanilla"):
        bench_members._configure(args, "K=9")


def test_members_of_the_users_own() -> None:
    parser = bench_arguments.parser("members")
    defined = ["--define", "small", "--num-layers 2 --phd-repeat 3", "--define", "K=2", "--phd-repeat 4"]
    args = parser.parse_args(["--preset", "tiny-dense", "--options", "--vocab-size 300", *defined])
    model = bench_members._configure(args, "small+hybrid_star").model
    assert (model.num_layers, model.phd_repeat, model.norm_scheme) == (2, 3, "hybrid_star")
    assert bench_members._configure(args, "K=2").model.phd_repeat == 4
    refused = {"--num-layers 2 x": "each have one value", "2 --num-layers": "each have", "'": "close the quotation"}
    for options, message in refused.items():
        args = parser.parse_args(["--preset", "tiny-dense", "--define", "odd", options])
        with pytest.raises(UserError, match=message):
            bench_members._configure(args, "odd")


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("window_forward_kernel", "attention"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "GEMM"),
        ("void multi_tensor_apply_kernel<adam>", "optimizer"),
        ("void rmsnorm_fwd_tuned_kernel", "norm and RoPE"),
        ("swiglu_forward_kernel", "SwiGLU"),
        ("weighted_swiglu_backward_kernel", "SwiGLU"),
        ("gather_sum_kernel", "MoE routing"),
        ("clear_empty_groups_kernel", "MoE routing"),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<GemmUniversal>>", "GEMM"),
        ("cross_entropy_statistics_kernel", "cross-entropy"),
        ("norm_rope_backward_kernel", "norm and RoPE"),
        ("key_gradient_kernel", "attention"),
        ("forward_kernel", "attention"),
        ("void at::native::vectorized_elementwise_kernel", "other"),
    ],
)
def test_kinds_of_kernels(kernel: str, kind: str) -> None:
    assert bench_members.kind_of(kernel) == kind
