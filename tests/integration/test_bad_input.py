"""Everything wrong with a start is said in one message with the value, the reason and the cure, before training.

Most cases call the program in this process: what is refused needs no process group, and an exception that is no
refusal would be raised here with its traceback.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from phd_megatron.cli.main import main

from .conftest import TINY_MODEL, flags, run_program

Options = dict[str, object]
ITERATION = re.compile(r"iteration +\d+/")


@dataclass
class Place:
    """A valid run and the directory in which a case spoils something."""

    directory: Path
    data: Path
    checkpoint: Path

    def options(self, **changes: object) -> Options:
        """Options of a run that would work; a change to None leaves one out. Underscores are dashes."""
        values: Options = {
            **TINY_MODEL,
            "norm-scheme": "hybrid_star",
            "phd-repeat": 2,
            "phd-window": 5,
            "phd-chunk": 8,
            "data-path": self.data,
            "micro-batch-size": 2,
            "global-batch-size": 8,
            "train-iters": 2,
            "eval-iters": 0,
            "log-interval": 1,
            "device": "cpu",
        }
        values |= {name.replace("_", "-"): value for name, value in changes.items()}
        return {name: value for name, value in values.items() if value is not None}

    def copy_of_data(self) -> Path:
        """The data to be spoiled: its four parts under another prefix."""
        for source in self.data.parent.glob(f"{self.data.name}.*"):
            target = self.directory / source.name
            if source.is_dir():
                shutil.copytree(source, target)
            else:
                shutil.copy(source, target)
        return self.directory / self.data.name


@pytest.fixture(scope="module")
def checkpoint(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a complete checkpoint of one step, of the run that ``Place.options`` describes."""
    save = tmp_path_factory.mktemp("checkpoint")
    options = Place(save, documents, save).options(save=save, train_iters=1)
    assert main(["pretrain", *flags(options)]) == 0
    return save


@pytest.fixture
def place(tmp_path: Path, documents: Path, checkpoint: Path) -> Place:
    return Place(tmp_path, documents, checkpoint)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """``refused(argv, *words, ranks=1)``: the program prints one error with all the words and does not train."""

    def check(argv: list[str], *words: str, ranks: int = 1) -> str:
        if ranks > 1:
            variables = {"RANK": "0", "WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
            for name, value in variables.items():
                monkeypatch.setenv(name, value)
        code = main(argv)
        out, err = capsys.readouterr()
        assert code == 2, f"{code}\n{out}\n{err}"
        assert err.startswith("error: ") and err.count("error: ") == 1 and "Traceback" not in err, err
        assert not ITERATION.search(out), out
        for word in words:
            assert word in err, f"{word!r} is not in: {err}"
        return err

    yield check


def pretrain(options: Options, *more: str) -> list[str]:
    return ["pretrain", *flags(options), *more]


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--num-layer 4", ("unknown flag --num-layer", "did you mean --num-layers?")),
        ("--tensor-parallel-size 2", ("--tensor-parallel-size", "--tensor-model-parallel-size")),
        ("-lr 1", ("'-lr'", "did you mean --lr?")),
        ("stray", ("'stray'", "belongs to no flag")),
        ("--lr", ("--lr has no value", "write --lr VALUE")),
        ("--num-layers four", ("num_layers='four'", "flag --num-layers", "is not an integer", "correct the value")),
        ("--lr fast", ("lr='fast'", "is not a number")),
        ("--lr-decay-style cosin", ("lr_decay_style='cosin'", "did you mean cosine?")),
        ("--bf16 maybe", ("'maybe'", "belongs to no flag")),
        ("--norm-scheme hybrid_sta", ("norm_scheme", "hybrid_sta", "hybrid_star")),
        ("--cp-comm-type a2a", ("cp_comm_type='a2a'", "all_gather, p2p")),
        ("--hybrid-context-parallel", ("hybrid_context_parallel=True", "alike", "use context_parallel_size")),
        ("--num-query-groups 3", ("num_attention_heads=4", "num_query_groups=3", "use one of 1, 2, 4")),
        ("--micro-batch-size 0", ("micro_batch_size=0", "at least 1")),
        ("--lr -1", ("lr=-1.0", "above 0")),
        ("--micro-batch-size 3", ("global_batch_size=8", "micro_batch_size=3", "change one of them")),
        ("--train-samples 8", ("train_iters=2", "train_samples=8", "exclude each other")),
        ("--lr-warmup-iters 2", ("warm-up of 16 samples", "decay of 16 samples", "shorten")),
        ("--bf16 --fp16", ("bf16=True", "fp16=True", "exclude each other")),
        ("--phd-repeat 0", ("phd_repeat", "0")),
        ("--phd-window 0", ("phd_window", "0")),
        ("--vocab-size 100", ("257 tokens", "vocab_size is 100", "set vocab_size to at least 257")),
        ("--seq-length 100000", ("needs 100001", "give more data", "smaller --seq-length")),
        ("--split 1,2,3,4", ("split='1,2,3,4'", "969,30,1")),
        ("--finetune", ("finetune=True", "set load")),
        ("--save-interval 1", ("save_interval=1", "set save")),
        ("--device gpu", ("device='gpu'", "one of auto, cpu, cuda")),
    ],
)
def test_flags(words: str, said: tuple[str, ...], place: Place, refused: Callable[..., str]) -> None:
    refused(pretrain(place.options(), *words.split()), *said)


def test_length_and_data_are_asked_for(place: Place, refused: Callable[..., str]) -> None:
    missing = place.options(train_iters=None, data_path=None)
    refused(pretrain(missing), "2 problems", "--train-iters N", "--data-path PREFIX", "phd-megatron prepare")
    refused(pretrain(place.options(hidden_size=None)), "hidden_size is not set", "--hidden-size N")


@pytest.mark.parametrize(
    ("ranks", "changes", "said"),
    [
        (2, {"tensor_model_parallel_size": 4}, ("tensor 4 x pipeline 1", "= 4", "world size 2", "start 4 ranks")),
        (4, {"tensor_model_parallel_size": 3}, ("= 3 does not divide world size 4", "start 3 or 6 ranks")),
        (
            3,
            {"tensor_model_parallel_size": 3},
            ("num_attention_heads 4", "tensor_model_parallel_size 3", "use a size that divides 4"),
        ),
        (
            2,
            {"tensor_model_parallel_size": 2, "sequence_parallel": True, "seq_length": 25},
            ("seq_length 25 is not divisible by 2", "sequence parallelism", "use 26"),
        ),
        (3, {"pipeline_model_parallel_size": 3}, ("num_layers 4", "pipeline 3", "use 6 layers")),
        (3, {}, ("global_batch_size 8", "data-parallel size 3 = 6", "use 12")),
        (
            2,
            {"tensor_model_parallel_size": 2, "make_vocab_size_divisible_by": 1},
            ("padded vocabulary 257", "set make_vocab_size_divisible_by to 2"),
        ),
        (2, {"ffn_hidden_size": 49, "tensor_model_parallel_size": 2}, ("ffn_hidden_size 49", "use 50")),
        (1, {"tensor_model_parallel_size": 2}, ("= 2 does not divide world size 1", "start 2 ranks")),
        (
            2,
            {"context_parallel_size": 2, "seq_length": 26},
            ("seq_length 26 is not divisible by 4", "context parallelism cuts 2 x 2 slices", "use 28"),
        ),
        (
            4,
            {"context_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True, "seq_length": 28},
            ("seq_length 28 is not divisible by 8", "2 x 2 slices", "sequence parallelism", "use 32"),
        ),
        (
            2,
            {"context_parallel_size": 2, "phd_repeat": 2, "phd_window": 8, "phd_chunk": 24},
            ("phd_window=8 reaches 7 positions back", "slice of 6 tokens", "at most 7", "smaller context_parallel"),
        ),
    ],
)
def test_layouts(
    ranks: int, changes: Options, said: tuple[str, ...], place: Place, refused: Callable[..., str]
) -> None:
    refused(pretrain(place.options(**changes)), *said, ranks=ranks)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_samples": 7}, ("train_samples=7", "less than one batch of 8", "8 or more")),
        ({"rampup_batch_size": [8, 2, 8]}, ("[8, 2, 8]", "global_batch_size=8", "start below it")),
        ({"rampup_batch_size": [2, 4, 8]}, ("[2, 4, 8]", "an increment that divides the difference")),
        ({"rampup_batch_size": [3, 1, 8]}, ("start 3", "micro_batch_size 2", "use 4")),
    ],
)
def test_batches(changes: Options, said: tuple[str, ...], place: Place, refused: Callable[..., str]) -> None:
    refused(pretrain(place.options(train_iters=None, **{"train_samples": 64, **changes})), *said)


def test_variables_of_a_launcher_that_are_incomplete(
    place: Place, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    refused(pretrain(place.options()), "RANK=0", "MASTER_ADDR", "start with torchrun")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models:\n  num_layers: 4\n", ("unknown section 'models'", "did you mean model?")),
        ("num_layers: 4\n", ("unknown section 'num_layers'", "below `model:`")),
        ("model:\n  num_layer: 4\n", ("unknown field 'num_layer' in section 'model'", "did you mean num_layers?")),
        ("training:\n  lr: 1.0\n", ("unknown field 'lr' in section 'training'", "section 'optimizer'")),
        ("model:\n  num_layers: four\n", ("num_layers='four'", "section model", "is not an integer")),
        ("model:\n  num_layers: 4\n  num_layers: 5\n", ("'num_layers'", "line 2", "line 3", "keep one")),
        ("model: [\n", ("line 2", "is not YAML", "correct it")),
        ("- a\n", ("holds list", "`model:`")),
    ],
)
def test_yaml(text: str, said: tuple[str, ...], place: Place, refused: Callable[..., str]) -> None:
    path = place.directory / "run.yaml"
    path.write_text(text, encoding="utf-8")
    refused(pretrain(place.options(), "--config", str(path)), str(path), *said)


def test_missing_yaml(place: Place, refused: Callable[..., str]) -> None:
    refused(pretrain(place.options(), "--config", "no.yaml"), "cannot read no.yaml", "No such file", "give the path")


# ---------------------------------------------------------------- data


def spoil(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_data(suffix: str, place: Place, refused: Callable[..., str]) -> None:
    prefix = place.copy_of_data()
    lost = Path(f"{prefix}{suffix}")
    lost.unlink()
    refused(pretrain(place.options(data_path=prefix)), f"{lost} not found", "phd-megatron prepare", "--data-path")


def test_wrong_prefix(place: Place, refused: Callable[..., str]) -> None:
    wrong = place.options(data_path=f"{place.data}.bin", tokenizer="byte")
    refused(pretrain(wrong), "data.bin.idx not found", "prefix without .bin")
    nothing = place.directory / "none"
    refused(pretrain(place.options(data_path=nothing)), str(nothing), "prepare", "name the tokenizer")


@pytest.mark.parametrize(
    ("suffix", "change", "said"),
    [
        (".idx", lambda old: b"x" * len(old), ("is not an index of Megatron", "xxxxxxxxx", "again")),
        (".idx", lambda old: old[:200], ("is truncated", "200 bytes", "again")),
        (".idx", lambda old: old[:20], ("is truncated", "20 bytes", "again")),
        (".idx", lambda old: old + b"x", ("is damaged", "again")),
        (".bin", lambda old: old[:1000], ("is truncated", "1000 bytes", "again")),
        (".bin", lambda old: b"", ("is truncated", "0 bytes", "again")),
        (".bin", lambda old: old + b"xx", ("is longer than its index", "again")),
        (".meta.json", lambda old: b"{", ("cannot be read", "again")),
        (".meta.json", lambda old: old.replace(b'"bin_bytes": ', b'"bin_bytes": 1'), ("not of one prepare",)),
    ],
    ids=[
        *("idx-corrupt", "idx-truncated", "idx-header", "idx-longer", "bin-truncated", "bin-empty", "bin-longer"),
        *("sidecar-corrupt", "sidecar-other"),
    ],
)
def test_damaged_data(
    suffix: str, change: Callable[[bytes], bytes], said: tuple[str, ...], place: Place, refused: Callable[..., str]
) -> None:
    prefix = place.copy_of_data()
    spoil(Path(f"{prefix}{suffix}"), change)
    refused(pretrain(place.options(data_path=prefix)), f"{prefix}{suffix}", *said)


def test_data_of_another_tokenizer(place: Place, refused: Callable[..., str]) -> None:
    """A tokenizer of 300 tokens beside data of bytes: the ids would fit, and mean something else."""
    text = place.directory / "text.txt"
    text.write_text("to be or not to be, that is the question " * 50, encoding="utf-8")
    other = place.directory / "other"
    assert main(["prepare", "--input", str(text), "--output-prefix", str(other), "--tokenizer", "bpe:280"]) == 0
    wrong = place.options(tokenizer=f"{other}.tokenizer")
    refused(pretrain(wrong), "made with another tokenizer", "leave --tokenizer out", "prepare the data again")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b"", ("empty corpus", "1 files hold no text", "check --input")),
        ("empty.jsonl", b'{"text": ""}\n', ("empty corpus", "1 empty documents", "check --input")),
        ("latin.txt", b"na\xefve", ("latin.txt is not utf-8", "byte 2", "convert the file", "--on-decode-error skip")),
        ("latin.jsonl", b'{"text": "\xe9"}\n', ("latin.jsonl:1: not utf-8", "correct", "--on-decode-error skip")),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', ("broken.jsonl:2", "JSON")),
        ("other.jsonl", b'{"content": "a"}\n', ("other.jsonl", "'text'", "content", "--json-key")),
        ("picture.png", b"x", ("picture.png", "unknown kind", ".txt")),
    ],
)
def test_prepare(name: str, content: bytes, said: tuple[str, ...], place: Place, refused: Callable[..., str]) -> None:
    source = place.directory / "in" / name
    source.parent.mkdir()
    source.write_bytes(content)
    prefix = place.directory / "out" / "data"
    argv = ["prepare", "--input", str(source), "--output-prefix", str(prefix), "--workers", "1"]
    refused(argv, *said)
    assert not [*place.directory.glob("out/data*")], "nothing that a run would take for data"


def test_prepare_flags(place: Place, refused: Callable[..., str]) -> None:
    refused(["prepare", "--imput", "x"], "unknown flag --imput", "did you mean --input?")
    out = str(place.directory / "x")
    refused(["prepare", "--input", "nowhere.txt", "--output-prefix", out], "'nowhere.txt' does not exist")
    refused(["prepare", "--input", __file__, "--output-prefix", out, "--tokenizer", "bite"], "bite", "byte")


# ---------------------------------------------------------------- checkpoints and places to write


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 64}, ("hidden_size=64", "hidden_size=32", "architecture cannot change", "without --load")),
        ({"num_layers": 2}, ("num_layers=2", "num_layers=4", "architecture cannot change")),
        ({"norm_scheme": "pre"}, ("norm_scheme='pre'", "norm_scheme='hybrid_star'", "leave the field out")),
        ({"phd_window": 4}, ("phd_window=4", "phd_window=5", "add --finetune, or leave the field out")),
    ],
)
def test_checkpoint_of_another_architecture(
    changes: Options, said: tuple[str, ...], place: Place, refused: Callable[..., str]
) -> None:
    refused(pretrain({"load": place.checkpoint, **flagged(changes)}), str(place.checkpoint), *said)


def flagged(changes: Options) -> Options:
    return {name.replace("_", "-"): value for name, value in changes.items()}


def test_checkpoints_that_cannot_be_loaded(place: Place, refused: Callable[..., str]) -> None:
    copy = shutil.copytree(place.checkpoint, place.directory / "copy")
    iteration = copy / "iter_0000001"
    tensors = iteration / "__0_0.distcp"
    content = tensors.read_bytes()
    tensors.write_bytes(content[:5000])
    refused(pretrain({"load": copy}), str(tensors), "5000 bytes")
    tensors.write_bytes(content)
    (iteration / "run_config.yaml").write_text("model: [", encoding="utf-8")
    refused(pretrain({"load": copy}), str(iteration / "run_config.yaml"), "is not YAML")
    (iteration / "metadata.json").unlink()
    refused(pretrain({"load": iteration}), "is not a complete checkpoint", "its save was interrupted")
    nothing = place.options(load=place.directory / "none", exit_on_missing_checkpoint=True)
    refused(pretrain(nothing), "holds no complete checkpoint", "correct the path, or drop the flag")
    refused(pretrain(place.options(load=__file__)), "is a file", "give the directory")


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("save", ("cannot make --save", "choose another directory")),
        ("metrics-file", ("metrics_file=", "cannot be written", "choose another")),
        ("tensorboard-dir", ("tensorboard_dir=", "cannot be written", "choose another")),
        ("data-cache-path", ("--data-cache-path", "cannot be written", "name a directory that can be written")),
    ],
)
def test_places_that_cannot_be_written(
    option: str, said: tuple[str, ...], place: Place, refused: Callable[..., str]
) -> None:
    """Below a regular file: nobody can make a directory there, root neither."""
    (place.directory / "file").write_text("")
    target = place.directory / "file" / "below"
    refused(pretrain({**place.options(), option: target}), str(target), str(place.directory / "file"), *said)


def test_save_directory_without_the_right_to_write(place: Place, refused: Callable[..., str]) -> None:
    target = place.directory / "save"
    target.mkdir()
    (target / ".lock").mkdir()  # what a read-only directory does to anybody but root
    refused(pretrain(place.options(save=target)), f"cannot save into {target}", "choose a writable --save")
    (target / ".lock").rmdir()
    if os.geteuid() != 0:
        target.chmod(0o500)
        refused(pretrain(place.options(save=target)), "Permission denied", "choose a writable --save")


# ---------------------------------------------------------------- as a process


def test_under_torchrun_one_message_for_all_ranks(place: Place, torchrun: Callable[..., object]) -> None:
    argv = pretrain(place.options(tensor_model_parallel_size=4))
    done = torchrun(2, "-m", "phd_megatron", *argv, check=False, timeout=240)
    assert done.returncode != 0
    assert done.stdout.count("error: tensor 4 x pipeline 1 x context 1 = 4 does not divide world size 2") == 1
    assert "[rank" not in done.stdout and not ITERATION.search(done.stdout)
    assert "exitcode  : 2" in done.stdout  # torchrun may stop the slower rank by a signal


def test_alone_the_message_is_all_there_is(place: Place) -> None:
    done = run_program(*pretrain(place.options(), "--num-layer", "4"))
    assert (done.returncode, done.stdout) == (2, "error: unknown flag --num-layer; did you mean --num-layers?\n")
