"""Files and directories that are not what a command takes them for; places that cannot be written."""

from __future__ import annotations

from .rows import DIRECTORY, FIFO, RUN, Content, Link, Row

PREPARE = "prepare --output-prefix data --workers 1 --no-progress"
TEXT = {"in.txt": "some text to prepare\n"}


def prepare(words: str, *said: str, files: dict[str, Content] | None = None, **options: object) -> Row:
    return Row(f"{PREPARE} {words}", said, files=files or {}, **options)  # type: ignore[arg-type]


def run(words: str, *said: str, files: dict[str, Content] | None = None, **options: object) -> Row:
    return Row(f"pretrain {RUN} {words}", said, files=files or {}, **options)  # type: ignore[arg-type]


INPUTS = [
    prepare("--input in.txt", "in.txt", "pipe", files={"in.txt": FIFO}),
    prepare("--input d", "empty corpus", "d", files={"d/in.txt": FIFO}, name="prepare a directory with a pipe"),
    prepare("--input /dev/zero", "input '/dev/zero'", " is "),
    prepare("--input none.txt", "'none.txt' does not exist", "check the path"),
    prepare("--input gone.txt", "'gone.txt'", "check the path", files={"gone.txt": Link("nowhere")}),
    prepare("--input loop.txt", "'loop.txt'", "check the path", files={"loop.txt": Link("loop.txt")}),
    prepare("--input ''", "--input", "is empty", "give a value"),
    prepare("--input", "--input has no value", "write --input VALUE"),
    prepare("--input a.png", "'a.png' is of an unknown kind", "supported are .txt", files={"a.png": "x"}),
    prepare("--input d", "empty corpus", "no file of a supported kind", "d", files={"d": DIRECTORY}),
    prepare("--input empty.txt", "empty corpus", "check --input", files={"empty.txt": ""}),
    prepare("--input a.jsonl", "a.jsonl:1", "JSON", files={"a.jsonl": "{"}),
    prepare("--input a.jsonl", "a.jsonl:1", "'text'", "--json-key", files={"a.jsonl": '{"x": 1}'}, name="no such key"),
    prepare("--input a.jsonl", "a.jsonl:1", "text", files={"a.jsonl": '{"text": 5}'}, name="a number as text"),
    prepare("--input a.jsonl", "a.jsonl:1", "JSON", files={"a.jsonl": "[" * 100_000}, name="100,000 brackets of JSON"),
    prepare("--input a.jsonl", "a.jsonl:1", "text", files={"a.jsonl": '{"text": ' + "9" * 5000 + "}"}, name="digits"),
    prepare("--input a.jsonl.gz", "a.jsonl.gz", "gzip", files={"a.jsonl.gz": "no gzip"}),
    prepare("--input a.txt", "a.txt is not utf-8", "byte 1", "--on-decode-error skip", files={"a.txt": b"a\xff"}),
    prepare("--input in.txt --tokenizer bite", "bite", "byte", files=TEXT),
    prepare("--input in.txt --tokenizer bpe:many", "bpe:many", "bpe:", files=TEXT),
    prepare("--input in.txt --tokenizer bpe:-5", "-5", "at least", files=TEXT),
    prepare("--input in.txt --tokenizer bpe:" + "9" * 5000, "bpe:999", "bpe:", files=TEXT, name="bpe of 5,000 digits"),
    prepare("--input in.txt --tokenizer d", "d", "tokenizer", files={**TEXT, "d": DIRECTORY}, name="empty tokenizer"),
    prepare("--input in.txt --tokenizer ''", "--tokenizer", "is empty", "leave --tokenizer out", files=TEXT),
    prepare("--input in.txt --workers 0", "workers", "0", "1 or more", files=TEXT),
    prepare("--input in.txt --workers -3", "workers", "-3", "1 or more", files=TEXT),
    prepare("--input in.txt --workers 100000", "workers", "100000", "at most", files=TEXT),
    prepare(
        "--input in.txt --workers two", "--workers 'two' is no number of processes", "give for example", files=TEXT
    ),
    prepare("--input in.txt --json-key ''", "--json-key", "is empty", "leave --json-key out", files=TEXT),
    prepare("--input in.txt --on-decode-error drop", "--on-decode-error 'drop'", "use one of", "skip", files=TEXT),
    prepare("--imput in.txt", "unknown flag --imput", "did you mean --input?", files=TEXT),
    prepare("--input in.txt --output-prefix ''", "--output-prefix", "is empty", "give a value", files=TEXT),
    prepare("--input in.txt --output-prefix f/out", "f/out", "cannot", files={**TEXT, "f": ""}),
    Row("prepare --input in.txt", ("--output-prefix not given", "it is needed", "--help"), files=TEXT),
]

DATA = [
    run("--data-path none", "none", "phd-megatron prepare", "name the tokenizer"),
    run(
        "--data-path d",
        "d.tokenizer does not exist",
        "name the tokenizer",
        files={"d": DIRECTORY},
        name="a directory as data",
    ),
    run(
        "--data-path f --tokenizer byte",
        "f.idx",
        "not an index of Megatron",
        "again",
        files={"f.idx": "x" * 100, "f.bin": ""},
    ),
    run(
        "--data-path f --tokenizer byte", "f.idx", "is truncated", files={"f.idx": "", "f.bin": ""}, name="empty index"
    ),
    run(
        "--data-path f --tokenizer byte", "f.idx", "prepare", files={"f.idx": FIFO, "f.bin": ""}, name="a pipe as index"
    ),
    run(
        "--data-path f --tokenizer byte",
        "f.bin",
        "prepare",
        files={"f.idx": "x" * 100, "f.bin": FIFO},
        name="a pipe as data",
    ),
    run(
        "--data-path f --tokenizer byte",
        "f.idx",
        "prepare",
        files={"f.idx": DIRECTORY, "f.bin": ""},
        name="a directory as index",
    ),
    run("--data-path x @data", "'x' before", "no weight above 0", "W1 P1 W2 P2"),
    run("--data-path nan @data", "'nan' before", "no weight above 0", "W1 P1"),
    run("--data-path inf @data 1 @data", "'inf'", "weight", "PREFIX pairs"),
    run("--data-path -1 @data", "'-1' before", "no weight above 0", "W1 P1"),
    run("--split a,b", "split='a,b'", "write 969,30,1"),
    run("--split nan,1,1", "nan,1,1", "969,30,1"),
    run("--split inf", "inf", "969,30,1"),
    run("--split 1e308,1e308", "1e308,1e308", "969,30,1"),
    run("--split 0,0,0", "split='0,0,0'", "write 969,30,1"),
    run("--seq-length 10000000", "needs 10000001", "give more data", "smaller --seq-length"),
    run("--tokenizer none", "none", "tokenizer"),
    run("--tokenizer d", "d", "tokenizer", files={"d": DIRECTORY}, name="an empty directory as tokenizer"),
    run("--data-cache-path f/c", "--data-cache-path", "f/c", "cannot be written", files={"f": ""}),
]

PLACES = [
    run("--save f", "cannot make --save", "f", "choose another directory", files={"f": ""}),
    run("--save f/x", "cannot make --save", "f/x", "choose another directory", files={"f": ""}),
    run("--save p", "cannot make --save", "p", "choose another directory", files={"p": FIFO}),
    run("--save gone", "cannot make --save", "gone", "another directory", files={"gone": Link("no/where")}),
    run("--save ''", "save=''", "is empty", "leave save out"),
    run("--load ''", "load=''", "is empty", "leave load out"),
    run("--load f", "f is a file", "give the directory", files={"f": ""}),
    run("--load p", "p", "give the directory", files={"p": FIFO}),
    run("--load none --exit-on-missing-checkpoint", "none holds no complete checkpoint", "drop the flag"),
    run("--metrics-file p", "metrics_file=", "it is a pipe", "choose another", files={"p": FIFO}),
    run("--metrics-file d", "metrics_file=", "cannot be written", "choose another", files={"d": DIRECTORY}),
    run("--metrics-file f/m", "metrics_file=", "cannot be written", "choose another", files={"f": ""}),
    run("--metrics-file", "metrics_file=", "File name too long", more=("m" * 300,), name="a long metrics file"),
    run("--tensorboard-dir f/t", "tensorboard_dir=", "cannot be written", "choose another", files={"f": ""}),
    run("--dump-gradients-dir f/t", "dump_gradients_dir=", "cannot be written", "choose another", files={"f": ""}),
    run("--profile --profile-step-start 0 --profile-step-end 1 --profile-dir f/t", "f/t", "cannot", files={"f": ""}),
]

_BAD_JSON = {"brackets": "[" * 100_000, "list": "[]", "number": "5", "digits": '{"a": ' + "9" * 5000 + "}", "empty": ""}

HUGGING_FACE = [
    *(
        Row(
            f"{command} m{rest}",
            ("m", "config.json"),
            files={"m/config.json": text, "m/tokenizer.json": "{}"},
            name=f"{command.split()[0]}, config.json: {kind}",
        )
        for command, rest in (
            ("generate --prompt x --checkpoint", ""),
            ("evaluate --data-path @data --checkpoint", ""),
            ("import --output out --hf-dir", ""),
        )
        for kind, text in _BAD_JSON.items()
    ),
    Row("generate --prompt x --checkpoint m", ("m", "complete checkpoint"), files={"m/config.json": FIFO}),
    Row(
        "import --output out --hf-dir m",
        ("m/config.json is no regular file", "copy the directory again"),
        files={"m/config.json": FIFO},
    ),
    Row("import --output out --hf-dir m", ("config.json is missing", "give a directory"), {"m": DIRECTORY}, name="m"),
    Row("import --output out --hf-dir none", ("none", "config.json is missing", "give a directory")),
    Row("import --output out --hf-dir f", ("f", "config.json"), files={"f": ""}),
    Row("import --output @export --hf-dir @hf", ("export", "exists"), name="import into a directory with content"),
    Row("export --checkpoint @run --output @export", ("export", "exists", "--overwrite")),
    Row("export --checkpoint @run --output f/x", ("cannot write", "f", "choose another"), files={"f": ""}),
    Row("export --checkpoint none --output x", ("none holds no complete checkpoint", "give the directory of --save")),
    Row("export --checkpoint f --output x", ("f", "directory"), files={"f": ""}),
    Row("export --checkpoint d --output x", ("d holds no complete checkpoint", "give"), files={"d": DIRECTORY}),
    Row("export --checkpoint p --output x", ("p", "directory"), files={"p": FIFO}),
    Row("export --checkpoint @run --output x --dtype int8", ("dtype='int8'", "choose auto, float32")),
    Row("export --checkpoint @run --output x --max-shard-size 5XB", ("max_shard_size='5XB'", "write a number with")),
    Row("export --checkpoint @run --output x --max-shard-size -5", ("max_shard_size='-5'", "write a number with")),
    Row(
        "export --checkpoint @run --output x --max-shard-size " + "9" * 400,
        ("max_shard_size='999", "write a number with"),
        name="shard of 400 digits",
    ),
    Row("export --checkpoint @run --output ''", ("--output", "is empty", "give a value")),
    Row("export --checkpoint '' --output x", ("--checkpoint", "is empty", "give a value")),
    Row(
        "export --checkpoint r --output x",
        ("r/latest_checkpointed_iteration.txt", "move it away"),
        files={"r/latest_checkpointed_iteration.txt": DIRECTORY},
        name="tracker that is a directory",
    ),
    Row(
        "export --checkpoint r --output x",
        ("r/latest_checkpointed_iteration.txt", "move it away"),
        files={"r/latest_checkpointed_iteration.txt": FIFO},
        name="tracker that is a pipe",
    ),
]

OF_OTHERS = [
    run("--load @stock", "holds no optimizer state", "start from its parameters with --finetune"),
    run("--load @stock --finetune --num-attention-heads 4", "num_attention_heads=2, not 4", "Set the options"),
    run("--load @stock --finetune --rotary-base 5", "rotary_base=10000.0, not 5", "Set the options of this run"),
    run("--load @stock --finetune --num-layers 3", "num_layers=2, not 3", "Set the options of this run"),
    run("--load @stock --finetune --norm-scheme pre_qk", "qk_layernorm=False, not True", "Set the options of this run"),
    run("--load @stock --finetune --norm-scheme post", "this run has norm_scheme=post", "choose one of these"),
    run("--load @stock --phd-repeat 2", "this run has phd_repeat=2", "take its parameters with --finetune"),
    Row("export --checkpoint @stock --output x", ("run_config.yaml", "only checkpoints that phd-megatron saved")),
    Row("evaluate --checkpoint @stock", ("no run_config.yaml of phd-megatron", "load it with pretrain --load")),
    Row("export --checkpoint @run --output x --to nemo", ("--to", "'nemo'", "megatron")),
    Row("export --checkpoint @run --output x --to megatron --native", ("--native", "no effect", "leave that out")),
    Row(
        "export --checkpoint @run --output x --to megatron --max-shard-size 1GB", ("--max-shard-size", "leave that out")
    ),
    Row("export --checkpoint @run --output x --to megatron --verify full", ("--verify full", "use tensors or none")),
    Row("export --checkpoint @run --output x --to megatron --dtype int8", ("dtype='int8'", "choose auto, float32")),
    Row("export --checkpoint @run --output @stock --to megatron", ("stock", "exists", "--overwrite")),
    Row(
        "export --checkpoint @run --output @export --to megatron --overwrite",
        ("export", "has no exported.json", "no export of phd-megatron to Megatron"),
    ),
    Row(
        "export --checkpoint @run --output @stock --overwrite",
        ("stock", "exported.json in it is not an export's"),
        name="an export to Megatron replaced by one to Hugging Face",
    ),
]

FILES = [*INPUTS, *DATA, *PLACES, *HUGGING_FACE, *OF_OTHERS]
