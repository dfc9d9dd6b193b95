"""``phd-megatron chat``: a conversation with a model in the terminal."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from phd_megatron.cli.model_flags import add_served_model
from phd_megatron.cli.stop import clean_stop
from phd_megatron.console.arguments import Parser, parse_strictly
from phd_megatron.console.terminal import ask, is_asked, say, show, show_part, warn
from phd_megatron.errors import UserError, for_terminal, printable

if TYPE_CHECKING:
    from phd_megatron.serving.conversation import Conversation


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = Parser(
        prog="phd-megatron chat",
        description="Talk to a model, line by line; also with lines from a pipe. /reset begins again, /quit ends, and "
        "Ctrl-C stops an answer. A model without a chat template continues the text instead.",
    )
    add_served_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first; needs a chat template")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="of one answer, at most (all there is room for)"
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="sample, with logits divided by T")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample among the likeliest tokens of mass P")
    parser.add_argument("--seed", type=int, metavar="S", help="seed of sampling")
    return parser


def run(argv: list[str]) -> int:
    """Talk until /quit or the end of the input."""
    args = parse_strictly(build_parser(), argv)
    from phd_megatron.huggingface.generation import Sampling, check_amount
    from phd_megatron.serving.limits import Limits

    options = Sampling(args.temperature, None, args.top_p, args.seed).options()
    if args.max_new_tokens is not None:
        check_amount(args.max_new_tokens)
    from phd_megatron.serving.conversation import Conversation
    from phd_megatron.serving.loaded import engine_of, load_served
    from phd_megatron.serving.sampling import Choice

    temperature = (1.0 if args.temperature is None else args.temperature) if options["do_sample"] else 0.0
    choice = Choice(temperature=temperature, top_p=1.0 if args.top_p is None else args.top_p, seed=args.seed)
    with clean_stop():  # a checkpoint's export is temporary
        loaded = load_served(
            args.directory,
            Limits(0, max_batch_size=1),
            device=args.device,
            verify_checkpoint=args.verify_checkpoint,
            max_model_len=args.max_model_len,
        )
    if not loaded.served.has_template:
        if args.system is not None:
            raise UserError("--system needs a chat template, and this model has none; leave it out")
        say(
            "note: this model has no chat template, so it is not known how it was taught to talk: your lines are a "
            "text that it continues; `export --chat-template FILE` adds one"
        )
    with engine_of(loaded, args.decode_kernel) as engine:
        _talk(Conversation(loaded.served, engine, choice, system=args.system, max_tokens=args.max_new_tokens))
    return 0


def _talk(conversation: Conversation) -> None:
    """Line by line, until /quit or the end of the input. At a terminal nothing else ends it."""
    while True:
        try:
            line = ask("you> ")
        except KeyboardInterrupt:
            if not is_asked():
                raise
            show("\n/quit ends the program")
            continue
        except UserError as error:  # typed in no UTF-8
            warn(f"error: {error}")
            continue
        if line is None or line == "/quit":
            return
        try:
            _answer(conversation, line)
        except UserError as error:
            if not is_asked():
                raise
            warn(f"error: {for_terminal(str(error))}")


def _answer(conversation: Conversation, line: str) -> None:
    if line == "/reset":
        conversation.reset()
    elif line.startswith("/"):
        raise UserError(f"{line[:80]!r} is no command; there are /reset and /quit, and a space before / makes it text")
    elif line.strip():
        try:
            conversation.say(line, lambda piece: show_part(printable(piece)))
        except KeyboardInterrupt:
            show(" [stopped]", now=True)
        else:
            show(now=True)
