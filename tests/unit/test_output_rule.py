"""What a command may replace: what the same command wrote, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from phd_megatron.cli.main import main
from phd_megatron.data.preprocess import prepare
from phd_megatron.errors import UserError
from phd_megatron.runtime import output as outputs
from phd_megatron.sweep.document import document_kind

ROOT = Path(__file__).resolve().parents[2]
ATTENTION = ["bench", "attention", "--seq-length", "16", "--heads", "2", "--head-dim", "16", "--rounds", "1"]
ATTENTION += ["--device", "cpu", "--only-phd"]


def refused(capsys, words, *said):
    assert main([str(word) for word in words]) == 2, words
    error = capsys.readouterr().err
    assert "Traceback" not in error and all(text in error for text in said), error


def metrics(path: Path, loss: float) -> Path:
    lines = [
        {
            **{"iteration": step, "consumed_samples": step, "consumed_tokens": 8 * step, "consumed_flops": 8.0 * step},
            **{"lm_loss": loss / step, "iteration_seconds": 1.0, "validation_loss": None},
        }
        for step in range(1, 5)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("option", ["--json", "--csv", "--plot"])
def test_a_bench_replaces_its_own_reports_alone(tmp_path, capsys, option):
    place = tmp_path / f"place.{'svg' if option == '--plot' else option[2:]}"
    for content in (b'{"thesis": 1}', b"name,age\n", b"<svg></svg>", b"[]", b"\x00" * 100):
        place.write_bytes(content)
        refused(capsys, [*ATTENTION, option, place], str(place), f"choose another {option}")
        assert place.read_bytes() == content
    place.unlink()
    place.mkdir()
    refused(capsys, [*ATTENTION, option, place], "it is a directory")
    place.rmdir()
    os.mkfifo(place)
    refused(capsys, [*ATTENTION, option, place], "it is a named pipe")
    place.unlink()
    (tmp_path / "elsewhere").write_text("of somebody")
    place.symlink_to("elsewhere")
    refused(capsys, [*ATTENTION, option, place], "choose another")
    assert (tmp_path / "elsewhere").read_text() == "of somebody" and place.is_symlink()
    place.unlink()
    for _ in range(2):  # the second replaces the first
        assert main([*ATTENTION, option, str(place)]) == 0
    assert place.stat().st_size > 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", place.name]


def test_reports_of_evaluate_and_parity_are_refused_before_anything_is_read(tmp_path, capsys):
    place = tmp_path / "config.json"
    place.write_text('{"model_type": "llama"}')
    refused(capsys, ["evaluate", "--checkpoint", tmp_path / "none", "--json", place], "evaluate", "choose another")
    for option in ("--json", "--markdown"):
        refused(capsys, ["parity", option, place], "parity", f"choose another {option}")
    for name, said in (("", "is empty"), (tmp_path / "no" / "x.json", "is no directory")):
        refused(capsys, ["evaluate", "--checkpoint", tmp_path / "none", "--json", name], said)
    assert place.read_text() == '{"model_type": "llama"}'


def test_reports_of_earlier_releases_are_recognised(tmp_path):
    from phd_megatron.bench import results as bench_results
    from phd_megatron.cli import evaluate, parity

    kinds = {
        '{"loss": 1, "perplexity": 2, "tokens": 3, "samples": 4}': evaluate._REPORT,
        '{"tolerance": {}, "layouts": []}': parity._JSON,
        "relative errors against one rank, float32, at most": parity._MARKDOWN,
        '{"settings": {}, "where": {}, "results": []}': bench_results.REPORT,
        "machine,device,dtype,torch,threads,date,policy": bench_results.TABLE,
        "model,prefill ms": bench_results.TABLE,
    }
    for text, kind in kinds.items():
        (tmp_path / "old").write_text(text)
        outputs.write_file(tmp_path / "old", "--json", kind, "new")
        assert (tmp_path / "old").read_text() == "new"


def test_what_only_begins_like_a_bench_is_not_one(tmp_path):
    from phd_megatron.bench import results as bench_results

    kinds = {
        '{"where": "my house"}': bench_results.REPORT,
        '{"where": "here", "settings": {}}': bench_results.REPORT,
        '[{"where": 1, "results": 2}]': bench_results.REPORT,
        "model,price\nT,5000\n": bench_results.TABLE,
        "machine,device,dtype,torch,mine\n": bench_results.TABLE,
    }
    for text, kind in kinds.items():
        (tmp_path / "mine").write_text(text)
        with pytest.raises(UserError, match="is not replaced; choose another --json"):
            outputs.write_file(tmp_path / "mine", "--json", kind, "new")
        assert (tmp_path / "mine").read_text() == text
    written = (
        {"settings": {}, "where": "", "torch": "", "worst_error": 0, "rows": []},
        {"settings": {}, "where": "", "peak_tflops": None, "members": []},
        {
            **{"size": "", "precision": "", "where": "", "peak_tflops": None},
            **{"tokens": 1, "seconds": {}, "time_ratio": {}, "tflops": {}},
        },
    )
    for content in written:
        (tmp_path / "ours").write_text(json.dumps(content))
        outputs.check_file(tmp_path / "ours", "--json", bench_results.REPORT)


def test_output_into_a_device_is_written_through(tmp_path):
    kind = outputs.json_report("a report")
    outputs.write_file("/dev/null", "--json", kind, "text")
    words = (
        "from phd_megatron.runtime import output as o; o.write_file('/dev/stdout', '--json', o.json_report('x'), 'hi')"
    )
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.stdout == "hi", done.stderr


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no /dev/shm")
def test_a_file_below_dev_is_no_device(capsys):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        notes = Path(folder) / "n.txt"
        notes.write_text("of somebody")
        refused(capsys, ["evaluate", "--checkpoint", folder, "--json", notes], str(notes), "is not a report", "--json")
        assert notes.read_text() == "of somebody"
        os.mkfifo(Path(folder) / "pipe")
        refused(capsys, ["evaluate", "--checkpoint", folder, "--json", f"{folder}/pipe"], "it is a named pipe")
    for number in (987654, 9 * 10**30):
        words = ["evaluate", "--checkpoint", "no", "--json", f"/dev/fd/{number}"]
        refused(capsys, words, "no file is open there")


@pytest.mark.parametrize("mode", ["a", "w"])
def test_a_redirected_standard_output_is_not_emptied(tmp_path, mode):
    log = tmp_path / "log"
    log.write_text("before\n")
    words = "print('text'); from phd_megatron.runtime import output as o; "
    words += "o.write_file('/dev/stdout', '--json', o.json_report('x', 'k'), 'hi\\n'); print('after')"
    with open(log, mode) as stream:
        subprocess.run([sys.executable, "-c", words], stdout=stream, cwd=ROOT, timeout=300, check=True)
    assert log.read_text() == "before\n" * (mode == "a") + "text\nhi\nafter\n"


# ---------------------------------------------------------------- compare, sweep


def test_compare_replaces_its_own_files_alone(tmp_path, capsys):
    words = ["compare", f"a={metrics(tmp_path / 'a.jsonl', 4.0)}", f"b={metrics(tmp_path / 'b.jsonl', 3.0)}"]
    words += ["--output", str(tmp_path / "out")]
    for name in ("compare.md", "compare.svg", "compare.png"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / name).write_text("of somebody")
        refused(capsys, words, name, "choose another --output")
        assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["of somebody"]
        shutil.rmtree(tmp_path / "out")
    for _ in range(2):
        assert main(words) == 0
    (tmp_path / "file").write_text("of somebody")
    refused(capsys, [*words[:3], "--output", tmp_path / "file"], "choose another")


def test_a_folder_named_report_beside_a_foreign_plan_is_nobodys_to_replace(tmp_path, capsys):
    (tmp_path / "plan.json").write_text('{"format_version": "1.2", "planned_values": {}}')
    out = tmp_path / "report"
    words = ["compare", f"a={metrics(tmp_path / 'a.jsonl', 4.0)}", f"b={metrics(tmp_path / 'b.jsonl', 3.0)}"]
    for name in ("compare.md", "compare.png", "report.md"):
        out.mkdir()
        (out / name).write_text("of somebody")
        if name != "report.md":
            refused(capsys, [*words, "--output", out], name, "choose another --output")
        with pytest.raises(UserError, match="is not replaced"):
            outputs.write_file(out / name, "--output", document_kind(out / name), "new")
        assert [path.read_text() for path in out.iterdir()] == ["of somebody"]
        shutil.rmtree(out)


SWEEP = """
name: {name}
title: Micro
unit: nats per byte
base:
  model: {{num_layers: 2, hidden_size: 32, num_attention_heads: 4, seq_length: 24}}
  training: {{micro_batch_size: 4, global_batch_size: 4, eval_iters: 0}}
  tokens: 960
grid: {{norm_scheme: [pre, hybrid_star]}}
"""


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("some words of a text " * 200)
    prepare([tmp_path / "text.txt"], tmp_path / "data", progress=False)
    return tmp_path / "data"


def test_a_sweep_replaces_no_plan_of_others(tmp_path, capsys, text):
    def start(name, output):
        (tmp_path / "sweep.yaml").write_text(SWEEP.format(name=name))
        words = ["sweep", "--config", tmp_path / "sweep.yaml", "--output", output, "--launcher", "print"]
        return [*words, "--data-path", text]

    out = tmp_path / "out"
    out.mkdir()
    for content in ('{"my": "plan"}', "[]", "no JSON"):
        (out / "plan.json").write_text(content)
        refused(capsys, start("first", out), "plan.json", "no plan of a sweep")
        assert (out / "plan.json").read_text() == content and not (out / "members").exists()
    (out / "plan.json").unlink()
    assert main(list(map(str, start("first", out)))) == 0
    assert main(list(map(str, start("first", out)))) == 0  # the same one continues it
    plan = (out / "plan.json").read_text()
    refused(capsys, start("second", out), "holds the sweep 'first'", "another --output")
    assert (out / "plan.json").read_text() == plan
    run = next(out.glob("members/*/run.yaml"))
    run.write_text("of: somebody\n")
    refused(capsys, start("first", out), "run.yaml exists and was not written by a sweep")
    assert run.read_text() == "of: somebody\n"
    shutil.rmtree(out)
    assert main(list(map(str, start("first", out)))) == 0
    for home in (out / "members").iterdir():
        metrics(home / "metrics.jsonl", 4.0)
    (out / "report").mkdir()
    (out / "report" / "report.md").write_text("# a report of an earlier release, unsigned\n")
    for _ in range(2):
        assert main(["sweep", "report", str(out)]) == 0
    (out / "report" / "compare.md").write_text("of somebody")
    words = [f"{name}={home / 'metrics.jsonl'}" for name, home in zip("ab", (out / "members").iterdir(), strict=True)]
    refused(capsys, ["compare", *words, "--output", out / "report"], "compare.md", "choose another --output")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "report.md").write_text("of somebody")
    refused(capsys, ["sweep", "report", out, "--output", tmp_path / "docs"], "report.md", "choose another --output")
    assert (tmp_path / "docs" / "report.md").read_text() == "of somebody"
    for _ in range(2):
        assert main(["sweep", "report", str(out), "--output", str(tmp_path / "new")]) == 0


# ---------------------------------------------------------------- prepare


def write(path, content="of somebody"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


#: what stands at the prefix -> what the refusal says, with --overwrite too
OTHERS = {
    "somebody's .bin": (lambda p: write(p / "d.bin"), "d.bin has no .idx beside it"),
    "somebody's .idx": (lambda p: (write(p / "d.bin"), write(p / "d.idx")), "d.idx is no index of Megatron's"),
    "a folder for .bin": (lambda p: write(p / "d.bin" / "x"), "d.bin is no regular file"),
    "a link for .bin": (lambda p: (write(p / "far"), (p / "d.bin").symlink_to("far")), "d.bin is a link"),
    "somebody's tokenizer": (lambda p: write(p / "d.tokenizer" / "notes.txt"), "d.tokenizer holds notes.txt"),
    "a model as tokenizer": (lambda p: write(p / "d.tokenizer" / "model.safetensors"), "holds model.safetensors"),
    "a file as tokenizer": (lambda p: write(p / "d.tokenizer"), "d.tokenizer is no directory"),
    "a link as tokenizer": (
        lambda p: (write(p / "far" / "tokenizer.json"), (p / "d.tokenizer").symlink_to("far")),
        "d.tokenizer is a link",
    ),
    "somebody's sidecar": (lambda p: write(p / "d.meta.json", '{"a": 1}'), "d.meta.json is no sidecar"),
    "somebody's working folder": (lambda p: write(p / "d.partial" / "thesis.txt"), "d.partial holds thesis.txt"),
    "a file as working folder": (lambda p: write(p / "d.partial"), "d.partial is no directory"),
    "a link as working folder": (
        lambda p: ((p / "far").mkdir(), (p / "d.partial").symlink_to("far")),
        "d.partial is no directory",
    ),
}


def everything(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() if p.is_file() else b"" for p in sorted(root.rglob("*"))}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("over_data", [False, True], ids=["alone", "over data"])
def test_prepare_replaces_prepared_data_alone(tmp_path, what, over_data):
    write(tmp_path / "in" / "text.txt", "some words")
    make, said = OTHERS[what]
    place = tmp_path / "place"
    place.mkdir()
    if over_data:
        prepare([tmp_path / "in"], place / "d", progress=False)
        for name in ("d.bin", "d.idx", "d.meta.json"):
            if name in said or (name == "d.meta.json" and "no .idx" in said):
                (place / name).unlink()
        if "no .idx" in said:
            (place / "d.idx").unlink()
        if "d.tokenizer is" in said:
            shutil.rmtree(place / "d.tokenizer")
    make(place)
    before = everything(place)
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"move it away, or choose another --output-prefix|already exist"):
            prepare([tmp_path / "in"], place / "d", overwrite=overwrite, progress=False)
        assert everything(place) == before
    with pytest.raises(UserError, match=said):
        prepare([tmp_path / "in"], place / "d", overwrite=True, progress=False)


def test_prepare_goes_over_what_is_left_of_data(tmp_path):
    """Without .bin and .idx no word is needed; a tokenizer folder of unknown origin needs one."""
    write(tmp_path / "in" / "text.txt", "some words")
    prepare([tmp_path / "in"], tmp_path / "d", progress=False)
    for suffix in ("bin", "idx"):
        (tmp_path / f"d.{suffix}").unlink()
    prepare([tmp_path / "in"], tmp_path / "d", progress=False)
    for suffix in ("bin", "idx", "meta.json"):
        (tmp_path / f"d.{suffix}").unlink()
    with pytest.raises(UserError, match=r"d.tokenizer already exists; .*--overwrite"):
        prepare([tmp_path / "in"], tmp_path / "d", progress=False)
    prepare([tmp_path / "in"], tmp_path / "d", overwrite=True, progress=False)
    prepare([tmp_path / "in"], tmp_path / "again", tokenizer=tmp_path / "d.tokenizer", progress=False)


# ---------------------------------------------------------------- scripts


def test_scripts_replace_their_own_files_alone(tmp_path):
    runs = [f"a={metrics(tmp_path / 'a.jsonl', 4.0)}", f"b={metrics(tmp_path / 'b.jsonl', 3.0)}"]
    scripts = {"plot_losses.py": ("--output", "out.png"), "summarise_runs.py": ("--json", "out.json")}
    for name, (option, file) in scripts.items():
        words = [sys.executable, str(ROOT / "tools" / name), *runs, option, str(tmp_path / file)]
        write(tmp_path / file)
        done = subprocess.run(words, capture_output=True, text=True, timeout=400)
        assert done.returncode == 2 and "Traceback" not in done.stderr and f"choose another {option}" in done.stderr
        assert (tmp_path / file).read_text() == "of somebody"
        (tmp_path / file).unlink()
        for _ in range(2):
            assert subprocess.run(words, capture_output=True, timeout=400).returncode == 0
    write(tmp_path / "folder" / "abc.py", "mine = True\n")
    words = [sys.executable, str(ROOT / "tools" / "stdlib_corpus.py"), str(tmp_path / "folder")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=400)
    assert done.returncode == 1 and "nothing is copied" in done.stderr
    assert everything(tmp_path / "folder") == {"abc.py": b"mine = True\n"}


# ---------------------------------------------------------------- gradients


def test_gradients_are_not_dumped_over_something_else(tmp_path, capsys, text):
    from safetensors.torch import save_file

    (tmp_path / "more.jsonl").write_text('{"text": "some words of a text"}\n' * 200)
    prepare([tmp_path / "more.jsonl"], tmp_path / "more", progress=False)
    words = ["pretrain", "--num-layers", 1, "--hidden-size", 16, "--num-attention-heads", 2, "--seq-length", 16]
    words += ["--micro-batch-size", 1, "--global-batch-size", 1, "--train-iters", 1, "--eval-iters", 0]
    words += ["--data-path", tmp_path / "more", "--device", "cpu", "--dump-gradients-dir", tmp_path / "g"]

    def run():
        command = [sys.executable, "-m", "phd_megatron", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400)

    place = tmp_path / "g" / "iter_0000001"
    write(place / "metadata.json")
    done = run()
    assert done.returncode == 2 and "metadata.json is not of a dump of 1 rank(s)" in done.stderr
    assert everything(tmp_path / "g") == {"iter_0000001": b"", "iter_0000001/metadata.json": b"of somebody"}
    (place / "metadata.json").unlink()
    for _ in range(2):
        done = run()
        assert done.returncode == 0, done.stdout + done.stderr
    save_file({}, place / "rank_00001.safetensors", metadata={"places": "{}"})  # of a run with another number of ranks
    done = run()
    assert done.returncode == 2 and "choose another directory" in done.stderr


def test_metrics_are_not_put_into_a_file_of_others(tmp_path):
    from phd_megatron.config.schema import LoggingConfig
    from phd_megatron.training.metrics import Reporter

    path = tmp_path / "notes.txt"
    for content in ("of somebody\n", '{"my": "notes"}\n', "5\n"):
        path.write_text(content)
        with pytest.raises(UserError, match=r"notes\.txt' exists and holds no metrics of a run.* choose another"):
            Reporter(LoggingConfig(metrics_file=str(path)), True, 1, {}, None)
        assert path.read_text() == content
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"it is a pipe.* choose another"):
        Reporter(LoggingConfig(metrics_file=str(tmp_path / "pipe")), True, 1, {}, None)


@pytest.mark.parametrize(
    "raised", [lambda path: OSError(28, "No space left on device", path), lambda path: UserError(f"{path} is bad")]
)
def test_an_error_names_the_directory_that_was_asked_for(tmp_path, raised):
    """The temporary one is gone when the message is read."""
    output = tmp_path / "hf"
    with pytest.raises(UserError) as error, outputs.new_directory(output) as place:
        raise raised(str(place / "model.safetensors"))
    assert f"{output}/model.safetensors" in str(error.value) and ".tmp" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
