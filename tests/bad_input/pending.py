"""Rows whose cure is part of another change, by title: what each waits for. To be emptied as those changes come in."""

from __future__ import annotations

_DATA, _HF, _STORE = (
    "prepare and its inputs",
    "export, import, generate and what they replace",
    "checkpoint directories",
)
_RANGE = "an upper limit on the field"

PENDING: dict[str, str] = {
    **dict.fromkeys(
        (
            "prepare  --input in.txt",
            "prepare  --input in.txt --workers 100000",
            "bpe of 5,000 digits",
            "digits",
        ),
        _DATA,
    ),
    **dict.fromkeys(
        (
            "generate, config.json: brackets",
            "evaluate, config.json: brackets",
            "import, config.json: brackets",
            "import --output out --hf-dir m",
            "generate --checkpoint @export --prompt hello --max-new-tokens 1000000000000",
            "generate --checkpoint @export --prompt hello --temperature 1e-320",
            "generate --checkpoint @export --prompt hello --device cuda",
            "evaluate --checkpoint @run --json d",
            "evaluate --checkpoint @run --json p",
            "evaluate --checkpoint @run --json none/x.json",
            "evaluate --checkpoint @run --json f/x.json",
            "evaluate --checkpoint @run --json gone",
            "parity --json none/x",
            "parity --markdown d",
            "compare a=@metrics b=@metrics --output f",
            "bench attention --json f/x",
            "bench decode --plot d",
        ),
        _HF,
    ),
    **dict.fromkeys(("tracker that is a directory", "tracker that is a pipe"), _STORE),
    **dict.fromkeys(
        (
            "pretrain RUN --phd-repeat 1000000",
            "pretrain RUN --train-iters 100000000",
            "pretrain RUN --train-iters 9000000000000000000",
            "pretrain RUN --seed 9223372036854775807",
            "pretrain RUN --num-layers 1000000000",
            "pretrain RUN --hidden-size 1000000000",
            "pretrain RUN --ffn-hidden-size 1000000000",
            "pretrain RUN --vocab-size 1000000000000",
            "pretrain RUN --num-workers 100000",
            "pretrain RUN --global-batch-size 1000000000000",
            "pretrain RUN --distributed-timeout-minutes 1e300",
        ),
        _RANGE,
    ),
}
