"""``phd-megatron serve``: a model for OpenAI's clients."""

from __future__ import annotations

import argparse
import importlib.util
import os

from phd_megatron.cli.model_flags import add_served_model
from phd_megatron.cli.stop import clean_stop
from phd_megatron.console.arguments import Parser, parse_strictly
from phd_megatron.console.terminal import say
from phd_megatron.errors import UserError

KEY = "PHD_API_KEY"
_NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = Parser(
        prog="phd-megatron serve",
        description="Serve a model to OpenAI's clients: /v1/models, /v1/completions, /v1/chat/completions, and /health "
        f"and /metrics. Where the environment variable {KEY} is set, /v1 asks for that key.",
    )
    add_served_model(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on, 0 for a free one (%(default)s)")
    parser.add_argument("--model-name", metavar="NAME", help="what clients call the model (the directory's name)")
    parser.add_argument("--max-batch-size", type=int, default=32, metavar="N", help="rows of a forward (%(default)s)")
    parser.add_argument("--max-queue", type=int, default=256, metavar="N", help="rows that wait besides (%(default)s)")
    parser.add_argument("--max-body-bytes", type=int, default=4 << 20, metavar="N", help="of one request (%(default)s)")
    parser.add_argument(
        "--shutdown-seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="for what runs when a signal asks to end (%(default)s)",
    )
    return parser


def run(argv: list[str]) -> int:
    """Serve until a signal comes."""
    args = parse_strictly(build_parser(), argv)
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f'{", ".join(missing)} not installed, which serve needs: pip install "phd-megatron[serve]"')
    key = os.environ.get(KEY)
    if key is not None and (not key.isascii() or not key.isprintable() or not key.strip()):
        raise UserError(f"{KEY} is empty or has other characters than a header takes; set a key of ASCII, or unset it")
    from phd_megatron.serving.limits import Limits, check_amounts

    check_amounts(args.max_batch_size, args.max_queue, args.max_body_bytes, args.shutdown_seconds)
    from phd_megatron.serving.app import make_app
    from phd_megatron.serving.loaded import engine_of, load_served
    from phd_megatron.serving.metrics import Metrics
    from phd_megatron.serving.server import listening, serve

    limits = Limits(0, args.max_batch_size, args.max_queue, args.max_body_bytes)
    with listening(args.host, args.port) as place:  # before the model, which may take minutes
        with clean_stop():  # a checkpoint's export is temporary
            loaded = load_served(
                args.directory,
                limits,
                name=args.model_name,
                device=args.device,
                verify_checkpoint=args.verify_checkpoint,
                max_model_len=args.max_model_len,
            )
        served, metrics = loaded.served, Metrics()
        for note in loaded.notes:
            say(note)
        if not served.has_template:
            say("note: the model has no chat template: /v1/chat/completions is refused, /v1/completions is there")
        host, port = place.getsockname()[:2]
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        hello = f"serving {served.name} at {where}/v1, up to {loaded.limits.max_model_len:,} tokens a text"
        with engine_of(loaded, args.decode_kernel, metrics) as engine:
            metrics.follow(engine)
            serve(make_app(served, engine, metrics, key), engine, place, args.shutdown_seconds, lambda: say(hello))
    say("stopped")
    return 0
