"""``phd-megatron evaluate``: loss and perplexity on a data set, of a checkpoint or a Hugging Face directory."""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from phd_megatron.config.schema import RunConfig
from phd_megatron.console.arguments import Parser, parse_strictly
from phd_megatron.console.say_once import say_once
from phd_megatron.console.terminal import say, show
from phd_megatron.errors import UserError
from phd_megatron.runtime.context import Runtime, choose_device, install_backend
from phd_megatron.runtime.environment import Environment
from phd_megatron.runtime.output import check_file, json_report, write_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from phd_megatron.data.evaluation import Evaluation, Selection

_REPORT = json_report("a report of `phd-megatron evaluate`", "loss", "perplexity", "tokens", "samples")
_MOST_SAMPLES = 65_536  #: at once


def build_parser() -> Parser:
    """The command's flags."""
    parser = Parser(
        prog="phd-megatron evaluate",
        description="Mean loss per token and perplexity over one pass of a prepared data set, cut into samples as in "
        "training. A checkpoint runs in Megatron-Core and, under torchrun, in any layout; an exported directory, or "
        "another causal model of transformers, runs in transformers on one process. Both give the same number.",
        epilog="Without data flags a checkpoint, and its export, is evaluated on the validation split of the data it "
        "was trained on.",
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR_OR_HF_DIR", help="pretrain's --save directory, or an export"
    )
    _add_data_flags(parser)
    parser.add_argument(
        "--layout", default="", metavar="WORDS", help="such as tp2+sp, under torchrun; see parity --help"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default cuda where there is one"
    )
    parser.add_argument(
        "--copies",
        action="store_true",
        help="of a checkpoint also the loss of every copy's output through the same final norm and head: a diagnostic, "
        "since copies before the last are not trained to predict; the logits take phd_repeat times the memory, so "
        "lower --micro-batch-size where that is too much",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the result as JSON")
    parser.add_argument(
        "--verify-checkpoint",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare every file of a checkpoint with its checksum first (on)",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run the Python files in HF_DIR")
    return parser


def _add_data_flags(parser: Parser) -> None:
    parser.add_argument(
        "--data-path",
        nargs="+",
        metavar="PREFIX",
        help="prepared data, all of it unless --split; data of the training keeps the split it had there",
    )
    parser.add_argument("--split", metavar="A,B,C", help="shares of training, validation and test")
    parser.add_argument("--subset", choices=("train", "valid", "test"), help="which of them (default valid)")
    parser.add_argument("--num-samples", type=int, metavar="N", help="the first N samples (default: one pass)")
    parser.add_argument("--seq-length", type=int, metavar="N", help="tokens of a sample (default: as in training)")
    parser.add_argument("--micro-batch-size", type=int, metavar="N", help="samples at once (default: as in training)")
    for flag, help_text in (
        ("--eod-mask-loss", "no loss on end-of-document tokens (default: as in training)"),
        ("--reset-attention-mask", "no attention across documents (default: as in training)"),
        ("--reset-position-ids", "positions restart with each document (default: as in training)"),
    ):
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=help_text)


def run(argv: list[str]) -> int:
    """Evaluate and print one line, with ``--copies`` another for each copy.

    Returns:
        0, or 1 when the loss is not finite.
    """
    args = parse_strictly(build_parser(), argv)
    path = Path(args.checkpoint)
    for name in ("seq_length", "micro_batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: it must be at least 1")
    if args.json is not None:
        check_file(args.json, "--json", _REPORT)
    if args.micro_batch_size is not None and args.micro_batch_size > _MOST_SAMPLES:
        raise UserError(f"--micro-batch-size {args.micro_batch_size}: use at most {_MOST_SAMPLES:,}")
    is_export = (path / "config.json").is_file()
    result, selection, is_main = (_export if is_export else _checkpoint)(path, args)
    if is_main:
        show(str(result))
        for line in _copy_lines(result.copy_losses):
            show(line)
        if args.json is not None:
            _write(args.json, result, selection)
        if not math.isfinite(result.loss):
            say_once(
                f"error: the loss of {path} is {result.loss}: it is no model any more, since its parameters, or what "
                "it computes of this data, are not finite; evaluate an earlier checkpoint, or look for where the run "
                "diverged"
            )
    return 0 if math.isfinite(result.loss) else 1


def _checkpoint(path: Path, args: argparse.Namespace) -> tuple[Evaluation, Selection, bool]:
    environment = Environment.read()
    device = choose_device(args.device, environment.local_rank)[0]
    install_backend(device)  # before Megatron is imported

    from phd_megatron.checkpoint.status import own_config
    from phd_megatron.checkpoint.store import CheckpointError, latest_complete
    from phd_megatron.config.layouts import SINGLE, parse_layout
    from phd_megatron.config.serialize import load_yaml
    from phd_megatron.data.datasets import resolve_tokenizer
    from phd_megatron.data.evaluation import select_samples
    from phd_megatron.training.evaluation import evaluate_checkpoint, for_evaluation

    found = latest_complete(path)
    if found is None:
        raise CheckpointError(
            f"{path} holds neither a complete checkpoint nor a config.json; give pretrain's --save directory, one "
            "iter_... directory in it, or an exported directory"
        )
    config_file = own_config(found)
    if config_file is None:
        raise CheckpointError(
            f"{found} has no run_config.yaml of phd-megatron, so it does not say what model it holds; load it with "
            "pretrain --load and save it, and give that"
        )
    saved = load_yaml(config_file)
    if (found / "tokenizer").is_dir():
        saved.data.tokenizer = str(found / "tokenizer")
    subset = _choose_data(found, saved, args)
    config, notes = for_evaluation(
        saved, parse_layout(args.layout) if args.layout else SINGLE, device, environment.world_size
    )
    tokenizer = resolve_tokenizer(config)
    selection = select_samples(config, tokenizer, subset, args.num_samples)
    with Runtime.start(config.parallel, model=config.model, training=config.training) as runtime:
        for note in notes:
            runtime.log(f"note: {note}")
        runtime.log(f"evaluating {found} on {selection}")
        result = evaluate_checkpoint(
            found,
            config,
            runtime,
            tokenizer,
            subset,
            selection.samples,
            args.verify_checkpoint,
            args.copies,
            own_data=not args.data_path,
        )
        return result, selection, runtime.is_main


def _export(path: Path, args: argparse.Namespace) -> tuple[Evaluation, Selection, bool]:
    if args.layout or Environment.read().world_size > 1:
        raise UserError(
            f"{path} is a Hugging Face directory, which one process evaluates; start without torchrun and --layout, or "
            "give the Megatron checkpoint"
        )
    if args.copies:
        raise UserError(
            f"--copies with {path}: an exported model computes the last copy alone in its last layer, so there is no "
            "output of the others; give the Megatron checkpoint that was exported"
        )
    from phd_megatron.data.record import TrainingData

    config = RunConfig()
    record = TrainingData.read(path)
    if record is not None:
        record.put_into(config)
    elif not args.data_path:
        raise UserError(f"{path} does not say what data it was trained on; name prepared data with --data-path")
    device = choose_device(args.device)[0]
    install_backend(device)  # Megatron's datasets read the data

    from phd_megatron.data.datasets import resolve_tokenizer
    from phd_megatron.data.evaluation import check_selection, select_samples
    from phd_megatron.huggingface.evaluation import evaluate_model
    from phd_megatron.huggingface.generation import load_model

    # What needs no model is refused before one is loaded; the model's positions are known after that alone.
    trial = copy.deepcopy(config)
    subset = _choose_data(path, trial, argparse.Namespace(**{**vars(args), "seq_length": None}))
    if record is not None and not args.data_path:
        record.check_unchanged(trial, subset)
    check_selection(trial.data, subset, args.num_samples)
    model = load_model(path, path, device, args.trust_remote_code)
    _size_of_the_model(path, model, config, args.seq_length, record is not None)
    if os.path.lexists(path / "tokenizer.json"):
        config.data.tokenizer = str(path)
    _choose_data(path, config, args)
    tokenizer = resolve_tokenizer(config)
    selection = select_samples(config, tokenizer, subset, args.num_samples)
    say(f"evaluating {path} on {selection}")
    result = evaluate_model(model, config, tokenizer, subset, selection.samples, say)
    return result, selection, True


def _size_of_the_model(
    path: Path, model: PreTrainedModel, config: RunConfig, seq_length: int | None, recorded: bool
) -> None:
    """Put an exported model's vocabulary and positions into ``config``; ``recorded``: which has a sample's length."""
    from phd_megatron.data.record import RECORD

    # A model of several parts says it deeper.
    said, rows = getattr(model.config, "vocab_size", None), model.get_input_embeddings().num_embeddings
    config.model.vocab_size = said or rows
    longest: int | None = getattr(model.config, "max_position_embeddings", None)
    longest = longest or (config.model.seq_length if recorded else seq_length)
    if longest is None:
        raise UserError(f"{path} does not say how many positions its model was trained on; say --seq-length N")
    config.model.max_position_embeddings = longest
    if not recorded:
        config.model.seq_length = longest
    elif config.model.seq_length > longest:
        raise UserError(
            f"{path} was trained on samples of {config.model.seq_length} tokens by its {RECORD}, and on {longest} "
            "positions by its config.json; export it again"
        )


def _choose_data(source: Path, config: RunConfig, args: argparse.Namespace) -> str:
    """Put the command's data flags into ``config``, which holds the training's data; the split to evaluate."""
    from phd_megatron.data.record import names_recorded_data, require_files

    data = config.data
    is_whole = False
    if args.data_path:
        is_whole = args.split is None and not names_recorded_data(args.data_path, data)
        data.data_path = args.data_path
        data.train_data_path = data.valid_data_path = data.test_data_path = None
    elif args.split and not data.data_path:
        raise UserError(
            f"--split {args.split}: the run read training, validation and test data of their own, so there is nothing "
            "to split; choose one with --subset, or name data with --data-path"
        )
    if args.split or is_whole:
        data.split = args.split or "1,0,0"
    if args.seq_length is not None:
        longest = config.model.max_position_embeddings or config.model.seq_length
        if args.seq_length > longest:
            raise UserError(
                f"--seq-length {args.seq_length}: the model was trained on {longest} positions; use at most that"
            )
        config.model.max_position_embeddings, config.model.seq_length = longest, args.seq_length
    if args.micro_batch_size is not None:
        config.training.micro_batch_size = args.micro_batch_size
    for name in ("eod_mask_loss", "reset_attention_mask", "reset_position_ids"):
        if (value := getattr(args, name)) is not None:
            setattr(data, name, value)
    subset: str = args.subset or ("train" if is_whole else "valid")
    if not args.data_path:
        require_files(source, config, subset)
    return subset


def _copy_lines(losses: Sequence[float]) -> list[str]:
    count = len(losses)
    what = ["not trained to predict"] * (count - 1) + ["the model's loss"]
    return [
        f"diagnostic | copy {number} of {count} through the final norm and head | loss {loss:.6f} ({what[number - 1]})"
        for number, loss in enumerate(losses, 1)
    ]


def _finite(number: float) -> float | None:
    """A number as JSON has it, which knows neither infinity nor NaN: those are null."""
    return number if math.isfinite(number) else None


def _write(path: str, result: Evaluation, selection: Selection) -> None:
    content: dict[str, str | float | Sequence[str] | Sequence[float | None] | None] = {
        "loss": _finite(result.loss),
        "perplexity": _finite(result.perplexity),
        "tokens": result.tokens,
        "samples": result.samples,
        "seconds": result.seconds,
        "data": list(selection.data),
        "split": selection.split,
        "share": list(selection.share),
        "available_samples": selection.available,
        "seq_length": selection.seq_length,
    }
    if result.copy_losses:
        content["diagnostic_copy_losses"] = [*map(_finite, result.copy_losses)]
    write_file(path, "--json", _REPORT, json.dumps(content, indent=1) + "\n")
