"""Every command of the documents runs, in order and at tiny size, or says in ``table.py`` why it does not."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from .blocks import ROOT, commands, documents, unlabelled
from .table import STUDY_FILE, TABLE, TINY_RUN, Run

SWEPT = """\
title: Norm placements
base:
  preset: tiny-dense
  tokens: 1.5e+3
  model: {hidden_size: 32, ffn_hidden_size: 48, kv_channels: 8, seq_length: 48}
  parallel: {device: cpu}
  data: {split: '80,20,0'}
  training: {micro_batch_size: 8, global_batch_size: 8, eval_interval: 1000, eval_iters: 1}
  logging: {log_interval: 1}
grid: {depth: {8-layers: {num_layers: 2}}, norm_scheme: [pre, hybrid], seed: [1]}
baseline: {norm_scheme: pre}
launcher: {parallel: 2, threads: 1}
"""


@pytest.mark.parametrize("document", documents())
def test_every_command_is_accounted_for(document: str) -> None:
    found, known = commands(document), TABLE.get(document, {})
    assert unlabelled(document) == [], "say that it is bash, so that it is run"
    assert [command for command in found if command not in known] == [], "put it into tests/documents/table.py"
    assert [command for command in known if command not in found] == [], "no document has it any more"


def environment() -> dict[str, str]:
    variables = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = os.pathsep.join(filter(None, [str(ROOT), variables.get("PYTHONPATH")]))
    return {**variables, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "NPROC": "1"}


def run_words(words: list[str], place: Path) -> str:
    """What a program prints, which must end well."""
    done = subprocess.run(
        words,
        cwd=place,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, f"{shlex.join(words)}\nended with {done.returncode}:\n{done.stdout[-3000:]}"
    return done.stdout


def execute(step: Run, command: str, place: Path) -> None:
    """One command, as the table says; ``place`` is the working directory."""
    line = step.line(command)
    if "\n" in line:
        run_words([sys.executable, "-c", line], place)
        return
    words = shlex.split(line)
    programs = {
        "phd-megatron": [sys.executable, "-m", "phd_megatron"],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"],
        "python": [sys.executable],
        "bash": ["bash"],
    }
    if words[0] == "phd-megatron" and not step.program:
        from phd_megatron.cli.main import main

        assert main(words[1:]) == 0, line
        return
    run_words([*programs[words[0]], *words[1:]], place)


def tiny_study() -> str:
    """The example itself with its first two sizes, one seed, and a few steps."""
    study = yaml.safe_load((ROOT / STUDY_FILE.format("tiny")).read_text("utf-8"))
    study["base"]["tokens"] = 1.5e3
    study["base"]["model"]["seq_length"] = 48
    study["base"]["training"] |= {"micro_batch_size": 8, "global_batch_size": 8, "eval_iters": 1}
    sizes = study["grid"]["size"]
    study["grid"] |= {"size": dict(list(sizes.items())[:2]), "norm_scheme": ["pre", "hybrid"], "seed": [1]}
    return yaml.safe_dump(study)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the documents take for granted: text, data, a run, its export, a Llama, and the checkout's folders."""
    from phd_megatron.cli.main import main

    root = tmp_path_factory.mktemp("library")
    (root / "corpus").mkdir()
    lines = [f"{i} times {i} is {i * i}; " + "once upon a time " * (i % 7) for i in range(600)]
    (root / "corpus/text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    for folder in ("examples", "launch_scripts", "tools"):
        (root / folder).symlink_to(ROOT / folder)
    (root / "tiny_sweep.yaml").write_text(SWEPT)
    (root / "tiny_study.yaml").write_text(tiny_study())
    model = "num_layers: 2, hidden_size: 32, ffn_hidden_size: 48, num_attention_heads: 4, seq_length: 48"
    (root / "RUN.yaml").write_text(
        f"model: {{{model}, make_vocab_size_divisible_by: 16}}\ndata: {{data_path: [{root}/data/mine]}}\n"
        "training: {micro_batch_size: 2, global_batch_size: 4, train_iters: 3}\n"
    )
    prepare = f"prepare --input {root}/corpus --output-prefix {root}/data/mine --tokenizer bpe:300 --workers 1"
    run = TINY_RUN.replace("data/mine", f"{root}/data/mine") + " --device cpu --eval-iters 1 --split 80,20,0"
    for name, more in (("mine", "--norm-scheme hybrid_star --phd-repeat 2"), ("plain", "")):
        lines = [f"pretrain {run} {more} --make-vocab-size-divisible-by 16 --save {root}/runs/{name} --save-interval 1"]
        output = "runs/mine-hf" if name == "mine" else "some-llama"
        lines += [f"export --checkpoint {root}/runs/{name} --output {root}/{output} --verify none"]
        for line in [prepare, *lines] if name == "mine" else lines:
            assert main(line.split()) == 0, line
    return root


def place_for(document: str, library: Path, place: Path) -> None:
    """Links to what the document takes for granted; the README has text alone, and makes the rest."""
    made_here = ("data", "runs") if document == "README.md" else ()
    for path in library.iterdir():
        if path.name == "runs" and path.name not in made_here:
            (place / "runs").mkdir()
            for run in path.iterdir():
                (place / "runs" / run.name).symlink_to(run)
        elif path.name == "data" and path.name not in made_here:
            (place / "data").mkdir()
            for part in path.iterdir():
                (place / "data" / part.name).symlink_to(part)
        elif path.name not in made_here:
            (place / path.name).symlink_to(path)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "document", [name for name, steps in TABLE.items() if any(isinstance(step, Run) for step in steps.values())]
)
def test_commands_run(document: str, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place_for(document, library, tmp_path)
    monkeypatch.chdir(tmp_path)
    for command in commands(document):
        step = TABLE[document][command]
        if isinstance(step, Run):
            execute(step, command, tmp_path)
