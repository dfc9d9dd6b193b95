"""Flags of the commands that make a model write: generate, serve, chat."""

from __future__ import annotations

import argparse


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Where the model runs, what attends, and whether a checkpoint is looked at first."""
    parser.add_argument(
        "--decode-kernel",
        choices=("auto", "torch", "triton"),
        default="auto",
        help="attention of single steps: torch's, or the split-KV kernel, which auto takes on a GPU (%(default)s)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default cuda where there is one")
    parser.add_argument(
        "--verify-checkpoint",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare every file of a pretrain checkpoint with its checksum first (on)",
    )


def add_served_model(parser: argparse.ArgumentParser) -> None:
    """The model of serve and chat."""
    parser.add_argument("directory", metavar="HF_DIR_OR_CHECKPOINT", help="an export, or pretrain's --save directory")
    parser.add_argument(
        "--max-model-len",
        type=int,
        metavar="N",
        help="tokens of prompt and answer together (all the model was made for)",
    )
    add_model_flags(parser)
