"""``phd-megatron bench generate``: it checks before it times, and shares one set of weights."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from phd_megatron.bench import arguments as bench_arguments
from phd_megatron.bench import generate as bench_generate
from phd_megatron.cli import bench
from phd_megatron.errors import UserError

SMALL = [
    *("generate", "--num-layers", "2", "--hidden-size", "32", "--ffn-hidden-size", "48", "--num-attention-heads", "4"),
    *("--num-query-groups", "2", "--vocab-size", "80", "--prompt", "40", "--steps", "3", "--rounds", "2"),
    *("--device", "cpu", "--window", "4", "--chunk", "8"),
]


def test_table_json_csv_and_plot(tmp_path, capsys):
    places = [tmp_path / name for name in ("out.json", "out.csv", "out.svg")]
    words = ["--json", str(places[0]), "--csv", str(places[1]), "--plot", str(places[2])]
    assert bench.run([*SMALL, "--repeats", "2", "3", "--variants", "cswa", "swa", "naive", *words]) == 0
    report = json.loads(places[0].read_text())
    names = [(row["variant"], row["repeat"]) for row in report["rows"]]
    assert names == [("vanilla", 1), *((kind, k) for kind in ("cswa", "swa", "naive") for k in (2, 3))]
    assert report["worst_error"] < 1e-5
    first = report["rows"][0]
    assert first["prefill_ratio"] == first["decode_ratio"] == first["decode_cpu_ratio"] == 1.0
    by_name = {(row["variant"], row["repeat"]): row for row in report["rows"]}
    for part in ("prefill", "decode"):
        floors = {name: row[f"{part}_floor"] for name, row in by_name.items()}
        assert floors["naive", 3]["weights"] == floors["cswa", 3]["weights"] == floors["vanilla", 1]["weights"]
        assert floors["naive", 3]["originals"] == 3 * floors["cswa", 3]["originals"]
        assert floors["vanilla", 1]["hidden"] == floors["naive", 2]["hidden"] == 0 < floors["cswa", 2]["hidden"]
        assert floors["vanilla", 1]["flops"] < floors["cswa", 3]["flops"] < floors["naive", 3]["flops"]
    assert all(len(row["samples"]["prefill"]) == 2 and row["prefill_ms"] > 0 for row in report["rows"])
    rows = list(csv.reader(places[1].open()))
    assert len(rows) == 8 and rows[0][0] == "model" and rows[1][0] == "vanilla"
    assert "<svg" in places[2].read_text()
    said = capsys.readouterr().out
    assert "floor: operations, and bytes that have to move" in said
    assert "swa K=3" in said and f" on CPU, {torch.get_num_threads()} threads, torch {torch.__version__}\n" in said


def test_naive_repetition_reads_every_token_k_times():
    args = bench_arguments.parser("generate").parse_args([*SMALL[1:], "--repeats", "3", "--variants", "naive", "cswa"])
    vanilla, naive, cswa = bench_generate._contenders(args, "cpu")
    assert naive.model is vanilla.model
    ids = bench_generate._ids(args, 4)
    assert naive.tokens(ids).tolist() == [[token for token in ids[0].tolist() for _ in range(3)]]
    assert all(
        one.data_ptr() == two.data_ptr()
        for one, two in zip(vanilla.model.parameters(), cswa.model.parameters(), strict=True)
    )
    assert cswa.model.config.phd_repeat == 3 and vanilla.model.config.phd_repeat == 1


def test_replayed_steps_start_from_the_same_cache(monkeypatch):
    """What becomes a CUDA graph on a GPU, run without one."""
    args = bench_arguments.parser("generate").parse_args([*SMALL[1:], "--repeats", "3", "--variants", "naive", "cswa"])
    monkeypatch.setattr("phd_megatron.bench.timing.captured", lambda steps: steps)
    ids = bench_generate._ids(args, args.prompt + args.steps)
    found = []
    advance = bench_generate._advance
    monkeypatch.setattr(bench_generate, "_advance", lambda *given: found.append(advance(*given)))
    with torch.no_grad():
        for contender in bench_generate._contenders(args, "cpu"):
            width = contender.repeat if contender.naive else 1
            ways = bench_generate._ways(contender, ids, args)
            prefill, steps = bench_generate._replays(contender, *ways, ids, args)
            expected = contender.model(contender.tokens(ids)[:, : args.prompt * width]).logits[:, -1]
            for _ in range(2):
                found.clear()
                steps()
                assert contender.cache.get_seq_length() == (args.prompt + 1) * width
                assert len(found) == args.steps and all(torch.equal(logits, found[0]) for logits in found)
                prefill()
                torch.testing.assert_close(found[-1][:, -1], expected)
            assert not torch.equal(found[0], found[-1])


def test_what_cannot_be_recorded_is_launched_as_it_is(monkeypatch, capsys):
    args = bench_arguments.parser("generate").parse_args([*SMALL[1:], "--repeats", "3", "--variants", "cswa"])
    contender = next(bench_generate._contenders(args, "cpu"))

    def refuse(steps):
        raise RuntimeError("out of memory\nmore")

    monkeypatch.setattr("phd_megatron.bench.timing.captured", refuse)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    ids = bench_generate._ids(args, args.prompt + args.steps)
    ways = bench_generate._ways(contender, ids, args)
    assert bench_generate._replays(contender, *ways, ids, args) == ways
    assert (
        "vanilla is launched operation by operation, and Python's time counts: out of memory\n"
        in capsys.readouterr().out
    )


def test_a_wrong_result_is_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(bench_generate, "_error", lambda *_: float("nan"))
    assert bench.run([*SMALL, "--repeats", "2", "--variants", "cswa"]) == 1
    assert "not timed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--repeats", "1"], "K = 1 is always measured"),
        (["--prompt", "0"], "--prompt 0"),
        (["--threads", "0"], "threads"),
    ],
)
def test_refusals(words, message):
    with pytest.raises(UserError, match=message):
        bench.run([*SMALL, *words])
