"""Data that is damaged, of another kind, changed under a run, or not what a run was trained on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from phd_megatron.cli.main import main
from phd_megatron.data.indexed import IndexedWriter

from .conftest import ROOT, TINY_MODEL, flags, program_environment

Change = Callable[[Path], None]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """``refused(argv, *words)``: the program ends with code 2 and one message with all the words."""

    def check(argv: list[str], *words: str) -> str:
        capsys.readouterr()
        code = main(argv)
        out, err = capsys.readouterr()
        assert code == 2, f"{code}\n{out}\n{err}"
        assert err.startswith("error: ") and err.count("error: ") == 1 and "Traceback" not in err, err
        assert "validation loss" not in out, out
        for word in words:
            assert word in err, f"{word!r} is not in: {err}"
        return err

    yield check


@pytest.fixture
def data(documents: Path, tmp_path: Path) -> Path:
    """A copy of the data, to be spoiled."""
    return copy_data(documents, tmp_path / "data")


def copy_data(source: Path, target: Path) -> Path:
    target.parent.mkdir(exist_ok=True)
    for path in source.parent.glob(f"{source.name}.*"):
        copy = Path(f"{target}{path.name[len(source.name) :]}")
        (shutil.copytree if path.is_dir() else shutil.copy2)(path, copy)
    shutil.rmtree(f"{target}.cache", ignore_errors=True)
    return target


def pretrain(prefix: object, **changes: object) -> list[str]:
    values = {
        **TINY_MODEL,
        "num-layers": 1,
        "data-path": prefix,
        "micro-batch-size": 2,
        "global-batch-size": 4,
        "train-iters": 2,
        "eval-iters": 0,
        "log-interval": 1,
        "device": "cpu",
    }
    values |= {name.replace("_", "-"): value for name, value in changes.items()}
    return ["pretrain", *flags({name: value for name, value in values.items() if value is not None})]


# ---------------------------------------------------------------- the index


def parts(prefix: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths, pointers and document marks, mapped for writing."""
    path = Path(f"{prefix}.idx")
    sequences, marks = np.memmap(path, np.int64, "r", 18, (2,))
    lengths = np.memmap(path, np.int32, "r+", 34, (int(sequences),))
    pointers = np.memmap(path, np.int64, "r+", 34 + 4 * int(sequences), (int(sequences),))
    return lengths, pointers, np.memmap(path, np.int64, "r+", 34 + 12 * int(sequences), (int(marks),))


def swap(array: np.ndarray, one: int, other: int) -> None:
    array[[one, other]] = array[[other, one]]


def put(array: np.ndarray, place: int, value: int) -> None:
    array[place] = value


POINTERS = {
    "reversed": lambda p: p.__setitem__(slice(None), p[::-1].copy()),
    "shifted": lambda p: p.__iadd__(2),
    "shifted back": lambda p: p.__isub__(2),
    "by one byte": lambda p: put(p, 100, p[100] + 1),
    "one shifted": lambda p: put(p, 100, p[100] + 2),
    "negative": lambda p: put(p, 7, -2),
    "very negative": lambda p: put(p, 7, np.iinfo(np.int64).min),
    "out of range": lambda p: put(p, 7, 1 << 40),
    "largest": lambda p: put(p, 399, np.iinfo(np.int64).max - 1),
    "overlapping": lambda p: put(p, 9, p[8]),
    "two swapped": lambda p: swap(p, 50, 51),
    "all zero": lambda p: p.__setitem__(slice(None), 0),
}
MARKS = {
    "reversed": lambda m: m.__setitem__(slice(None), m[::-1].copy()),
    "shifted": lambda m: m.__setitem__(slice(0, -1), m[:-1] + 1),
    "negative": lambda m: put(m, 3, -1),
    "very negative": lambda m: put(m, 3, np.iinfo(np.int64).min),
    "first is not 0": lambda m: put(m, 0, 1),
    "beyond the end": lambda m: put(m, 200, 401),
    "far beyond": lambda m: put(m, 200, np.iinfo(np.int64).max),
    "two swapped": lambda m: swap(m, 50, 51),
    "last too small": lambda m: put(m, 400, 399),
    "last too large": lambda m: put(m, 400, 401),
}
LENGTHS = {
    "two swapped": lambda n: swap(n, 0, 4),
    "one negative, another larger": lambda n: n.__setitem__([0, 4], [-5, n[0] + n[4] + 5]),
    "one too long": lambda n: put(n, 3, 1 << 30),
}


@pytest.mark.parametrize(
    ("part", "name"),
    [*((0, name) for name in LENGTHS), *((1, name) for name in POINTERS), *((2, name) for name in MARKS)],
)
def test_index_that_does_not_fit(part: int, name: str, data: Path, refused: Callable[..., str]) -> None:
    arrays = parts(data)
    (LENGTHS, POINTERS, MARKS)[part][name](arrays[part])
    word = "document marks" if part == 2 else "in document"
    refused(pretrain(data, eval_iters=1), f"{data}.idx is damaged", word, "prepare or copy the data again")


def test_a_negative_length_whose_places_fit(data: Path, refused: Callable[..., str]) -> None:
    lengths, pointers, _ = parts(data)
    lengths[[0, 4]] = [-5, lengths[0] + lengths[4] + 5]
    pointers[1:] = 2 * np.cumsum(lengths[:-1])
    refused(pretrain(data), f"{data}.idx is damaged: sequence 0 of 400", "has -5 tokens", "again")


def test_every_command_and_all_ranks_look(data: Path, refused: Callable[..., str], torchrun: Callable[..., object],
                                          documents: Path, tmp_path: Path) -> None:  # fmt: skip
    save = tmp_path / "save"
    assert main(pretrain(documents, save=save)) == 0
    POINTERS["two swapped"](parts(data)[1])
    said = (f"{data}.idx is damaged", "sequence 50 of 400 (in document 50 of 400)", "again")
    refused(["evaluate", "--checkpoint", str(save), "--data-path", str(data), "--device", "cpu"], *said)
    new = tmp_path / "new"
    done = torchrun(2, "-m", "phd_megatron", *pretrain(data, save=new), check=False)
    assert done.returncode and done.stdout.count("error: ") == 1 and not new.exists(), done.stdout
    assert all(word in done.stdout for word in said) and "[rank" not in done.stdout, done.stdout
    command = ["evaluate", "--checkpoint", save, "--data-path", data, "--device", "cpu"]
    done = torchrun(2, "-m", "phd_megatron", *command, check=False)
    assert done.returncode and done.stdout.count("error: ") == 1 and "[rank" not in done.stdout, done.stdout
    assert all(word in done.stdout for word in said), done.stdout


def test_documents_without_text_and_several_sequences_a_document_are_fine(tmp_path: Path, documents: Path) -> None:
    with IndexedWriter(tmp_path, np.uint16) as writer:
        for _ in range(40):
            writer.add(np.arange(60) % 250, np.array([20, 0, 40]), np.array([0, 2, 2, 3]))
        writer.finish()
    assert main(pretrain(tmp_path / "data", tokenizer=f"{documents}.tokenizer")) == 0


def test_multimodal_index_is_said_to_be_one(data: Path, refused: Callable[..., str]) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{data}-multi.bin", np.uint16, multimodal=True)
    for number in range(50):
        builder.add_item(torch.arange(30), mode=number % 2)
        builder.end_document()
    builder.finalize(f"{data}-multi.idx")
    said = (f"{data}-multi.idx is an index of multimodal data", "50 sequences", "prepare the text alone")
    message = refused(pretrain(f"{data}-multi", tokenizer=f"{data}.tokenizer"), *said)
    assert "damaged" not in message


# ---------------------------------------------------------------- token ids


@pytest.mark.parametrize("place", [0, 12_000, -1])
@pytest.mark.parametrize("sidecar", [True, False])
def test_token_ids_beyond_the_vocabulary(place: int, sidecar: bool, data: Path, refused: Callable[..., str]) -> None:
    tokens = np.memmap(f"{data}.bin", np.uint16, "r+")
    tokens[place] = 60_000
    if not sidecar:
        Path(f"{data}.meta.json").unlink()
    said = ("token id 60000", f"at token {place % len(tokens)} of {len(tokens)}", "only 257 tokens", "again")
    refused(pretrain(data), f"data '{data}'", *said)


@pytest.mark.parametrize("kind", [np.int8, np.int16, np.int32, np.int64])
def test_negative_token_ids(kind: type, tmp_path: Path, documents: Path, refused: Callable[..., str]) -> None:
    with IndexedWriter(tmp_path, kind) as writer:
        tokens = np.arange(4000) % 100
        tokens[1234] = -3
        writer.add(tokens, np.array([2000, 2000]), np.array([1, 2]))
        writer.finish()
    said = ("a negative token id (-3 at token 1234 of 4000)", "257 tokens, from 0 on")
    refused(pretrain(tmp_path / "data", tokenizer=f"{documents}.tokenizer"), *said)


def test_tokenizer_larger_than_the_model(data: Path, refused: Callable[..., str]) -> None:
    refused(pretrain(data, vocab_size=200), "257 tokens but vocab_size is 200", "set vocab_size to at least 257")


# ---------------------------------------------------------------- while a run reads


def start_long_run(prefix: Path, *more: str) -> subprocess.Popen[str]:
    """A run of its own that has trained at least one step."""
    process = subprocess.Popen(
        [sys.executable, "-m", "phd_megatron", *pretrain(prefix, train_iters=100_000), *more],
        cwd=ROOT,
        env=program_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "iteration" in line and "/" in line and "lm loss" in line:
            return process
    raise AssertionError(f"it ended with {process.wait()}")


@pytest.mark.parametrize(("suffix", "workers"), [(".bin", 0), (".idx", 2)])
def test_a_file_that_is_cut_under_a_run_ends_it_with_a_message(suffix: str, workers: int, data: Path) -> None:
    process = start_long_run(data, "--num-workers", str(workers))
    path = Path(f"{data}{suffix}")
    size = path.stat().st_size
    os.truncate(path, 40)
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 2, output
    (line,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert f"{path} was cut while it is being read: it has 40 bytes, and had {size}" in line
    assert "from the last checkpoint" in line and "Traceback" not in output


# ---------------------------------------------------------------- the data of a run that goes on


def rewrite_tokens(prefix: Path) -> None:
    """Other text of the same length under the same name."""
    tokens = np.memmap(f"{prefix}.bin", np.uint16, "r+")
    letters = (tokens >= 97) & (tokens < 122)
    tokens[letters] += 1


@pytest.fixture(scope="module")
def trained(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Two data sets, and a run of two steps on a blend of them with validation on the second."""
    directory = tmp_path_factory.mktemp("trained")
    one, two = copy_data(documents, directory / "one"), copy_data(documents, directory / "two")
    rewrite_tokens(two)
    argv = pretrain(None, train_data_path=[3, one, 1, two], valid_data_path=two, eval_iters=1, save=directory / "save")
    assert main(argv) == 0
    return one, two, directory / "save"


def go_on(one: Path, two: Path, save: Path, *more: str) -> list[str]:
    argv = pretrain(None, train_data_path=[3, one, 1, two], valid_data_path=two, eval_iters=1, train_iters=3, load=save)
    return [*argv, "--save", str(save.parent / "further"), *more]


@pytest.fixture
def resumed(trained: tuple[Path, Path, Path], tmp_path: Path) -> tuple[Path, Path, Path]:
    """Copies of that, in another place."""
    one, two, save = trained
    shutil.copytree(save, tmp_path / "save")
    return copy_data(one, tmp_path / "moved" / "1st"), copy_data(two, tmp_path / "moved" / "2nd"), tmp_path / "save"


def test_a_checkpoint_says_what_it_was_trained_on(trained: tuple[Path, Path, Path]) -> None:
    (path,) = trained[2].glob("iter_*/training_state.json")
    record = json.loads(path.read_text())["data"]
    assert [name for name in record] == ["training", "validation"]
    assert len(record["training"]) == 2 and record["training"][1] == record["validation"][0]
    assert record["training"][0]["bin_bytes"] == trained[0].with_suffix(".bin").stat().st_size
    assert str(trained[0]) not in path.read_text()


def test_moved_data_is_the_same_data(resumed: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    one, two, save = resumed
    os.utime(f"{one}.bin")
    assert main(go_on(one, two, save)) == 0
    out = capsys.readouterr().out
    assert "iteration        3/" in out and "allow_changed_data is set" not in out


def other_documents(one: Path, two: Path) -> None:
    """The same text cut into other documents."""
    lengths, pointers, _ = parts(one)
    lengths[10] += 1
    lengths[11] -= 1
    pointers[11] += 2


def swapped(one: Path, two: Path) -> None:
    for suffix in (".bin", ".idx"):
        os.rename(f"{one}{suffix}", f"{one}.x")
        os.rename(f"{two}{suffix}", f"{one}{suffix}")
        os.rename(f"{one}.x", f"{two}{suffix}")


def longer(one: Path, two: Path) -> None:
    source = one.parent / "more.jsonl"
    source.write_text("".join(json.dumps({"text": f"{i} and more " * 9}) + "\n" for i in range(300)))
    argv = ["prepare", "--input", source, "--output-prefix", one, "--overwrite", "--workers", 1, "--no-progress"]
    assert main([*map(str, argv)]) == 0


CHANGES = {
    "first of the blend": (lambda one, two: rewrite_tokens(one), ("training data", "1st: other tokens in as many")),
    "validation too": (lambda one, two: rewrite_tokens(two), ("training data", "2nd: other tokens in as many")),
    "documents": (other_documents, ("1st: documents of other lengths in as many bytes",)),
    "swapped": (swapped, ("the same data sets in another order",)),
    "prepared again": (longer, ("1st: .bin and .idx have", "bytes, and had")),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_changed_data_is_refused(
    name: str, resumed: tuple[Path, Path, Path], refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, save = resumed
    change, said = CHANGES[name]
    change(one, two)
    cures = ("bring the data back", "--finetune", "--allow-changed-data")
    refused(
        go_on(one, two, save), "is not what the checkpoint was trained with", str(save / "iter_0000002"), *said, *cures
    )
    if name == "swapped":
        assert main(go_on(one, two, save, "--finetune")) == 0
        assert "allow_changed_data" not in capsys.readouterr().out.replace("allow_changed_data: false", "")
        assert main(go_on(one, two, save, "--allow-changed-data", "--save", str(save))) == 0
        assert "note: the training data is not what the checkpoint was trained with" in capsys.readouterr().out
        last = ("--train-iters", "4", "--save", str(save.parent / "last"))
        assert main(go_on(one, two, save, *last)) == 0  # what it was trained on last
        refused(go_on(two, one, save, "--train-iters", "4"), "the same data sets in another order")


def test_another_validation_set_and_another_number_of_sets(
    resumed: tuple[Path, Path, Path], refused: Callable[..., str]
) -> None:
    one, two, save = resumed
    refused(go_on(one, two, save, "--valid-data-path", str(one)), "the validation data", "1st: other tokens")
    refused(go_on(one, two, save, "--train-data-path", str(one)), "(1 data sets", "and 2 then)")
    assert main(go_on(one, two, save, "--valid-data-path", str(one), "--eval-iters", "0")) == 0


def test_checkpoints_without_or_with_a_damaged_record(
    resumed: tuple[Path, Path, Path], refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, save = resumed
    (path,) = save.glob("iter_*/training_state.json")
    state = json.loads(path.read_text())
    for damage in (3, {"training": 3}, {"training": [{"bin_bytes": 1}]}, {"training": [[]]}):
        path.write_text(json.dumps({**state, "data": damage}))
        refused(go_on(one, two, save, "--no-verify-checkpoint"), str(path), "--allow-changed-data")
    del state["data"]
    path.write_text(json.dumps(state))
    assert main(go_on(one, two, save, "--no-verify-checkpoint")) == 0
    assert "does not say what data it was trained on" in capsys.readouterr().out


def test_split_data(documents: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    prefix, save = copy_data(documents, tmp_path / "data"), tmp_path / "save"
    argv = pretrain(prefix, split="90,10,0", eval_iters=1, save=save, load=save)
    assert main(argv) == 0
    assert main([*argv, "--train-iters", "3"]) == 0
    rewrite_tokens(prefix)
    refused([*argv, "--train-iters", "4"], "the training data", "data: other tokens in as many bytes")


def test_evaluation_on_data_of_the_same_name(
    documents: Path, tmp_path: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    prefix, save = copy_data(documents, tmp_path / "data"), tmp_path / "save"
    assert main(pretrain(prefix, split="90,10,0", eval_iters=1, save=save)) == 0
    argv = ["evaluate", "--checkpoint", str(save), "--device", "cpu"]
    assert main(argv) == 0
    rewrite_tokens(prefix)
    refused(
        argv, "the validation data is not what the checkpoint was trained with", "data: other tokens", "--data-path"
    )
    assert main([*argv, "--data-path", str(prefix)]) == 0


NODES = """
import os, sys
from phd_megatron.runtime.context import install_backend
install_backend("cpu")
import torch.distributed as dist
from phd_megatron.config.schema import RunConfig
from phd_megatron.data.tokenizers import ByteTokenizer
from phd_megatron.errors import UserError
from phd_megatron.training.run_data import agree_on_data
dist.init_process_group("gloo")
for other in sys.argv[1:]:  # both ranks are the first of their node, and each has its own disk
    os.chdir(sys.argv[1] if dist.get_rank() == 0 else other)
    run = RunConfig()
    run.data.data_path, run.data.split = ["data"], "90,10,0"
    try:
        told = f"agreed on {list(agree_on_data(run, ByteTokenizer(), (1, 1, 0), 0))}"
    except UserError as error:
        told = f"rank {dist.get_rank()} says: {error}"
    print(told + "\\n", end="", flush=True)  # in one piece, since the ranks share the pipe
dist.destroy_process_group()
"""


def test_nodes_with_other_or_damaged_data(documents: Path, tmp_path: Path, torchrun: Callable[..., object]) -> None:
    for name in ("one", "same", "other", "damaged"):
        copy_data(documents, tmp_path / name / "data")
    rewrite_tokens(tmp_path / "other" / "data")
    POINTERS["reversed"](parts(tmp_path / "damaged" / "data")[1])
    (tmp_path / "nodes.py").write_text(NODES)
    output = torchrun(
        2, tmp_path / "nodes.py", *(tmp_path / name for name in ("one", "same", "other", "damaged"))
    ).stdout
    assert output.count("agreed on ['training', 'validation']") == 4
    for rank in (0, 1):
        assert f"rank {rank} says: the training data of the node of rank 1 is not that of rank 0" in output
        assert f"rank {rank} says: rank 1: data.idx is damaged" in output
