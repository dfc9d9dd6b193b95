"""YAML that is none, that stands for too much, or that says what no run can be."""

from __future__ import annotations

from .rows import DIRECTORY, FIFO, RUN, Link, Row, config

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {k: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{','.join(['*' + old] * 9)}]}}\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MODEL = "model: {num_layers: 2, hidden_size: 16, num_attention_heads: 2}\n"
TOO_MUCH = "write out what the run needs"
NO_NAME = "no file can be called that"

CONFIGS = [
    # what it stands for
    config(BOMB, "line 6", "200,000 values", TOO_MUCH, name="alias bomb"),
    config(BOMB, "200,000 values", TOO_MUCH, command=f"pretrain {RUN}", name="alias bomb, pretrain", process=True),
    config("model: {num_layers: &a [" + "*a," * 3 + "1]}", "line 1", "stands inside", TOO_MUCH, name="alias in itself"),
    config(MERGES, "200,000 values", TOO_MUCH, name="bomb of merge keys"),
    config(
        "model:\n  num_layers: &a [1,1,1,1,1,1,1,1,1]\n  hidden_size: [*a,*a,*a,*a,*a,*a,*a,*a,*a]\n",
        *("num_layers=[1, 1,", "is not an integer or null", "correct the value"),
        name="small aliases as numbers",
    ),
    config("[" * 100_000, "line 1", "nested more than 40 deep", TOO_MUCH, name="100,000 brackets"),
    config("{a: " * 50_000, "nested more than 40 deep", TOO_MUCH, name="50,000 braces"),
    config("- " * 5000, "nested more than 40 deep", TOO_MUCH, name="5,000 dashes"),
    config(
        "".join(" " * i + f"k{i}:\n" for i in range(600)),
        "line 40",
        "nested more than 40 deep",
        name="600 indentations",
    ),
    config("training: {seed: " + "9" * 5000 + "}", "line 1", "99999...", "5000 characters", name="5,000 digits"),
    config("training: {seed: 0x" + "f" * 5000 + "}", "0xff", "5002 characters", TOO_MUCH, name="5,000 hex digits"),
    config("training: {seed: 0x" + "f" * 300 + "}", "seed=", "bits)", "use a smaller number", name="300 hex digits"),
    config("optimizer: {lr: 1." + "0" * 5000 + "}", "1.000", "5002 characters", TOO_MUCH, name="5,000 decimals"),
    config("training: {seed: 1" + ":59" * 200 + "}", "1:59", "601 characters", name="5,000 in sixties"),
    config("x" * 300_000, "holds str, not sections", "write `model:`", name="one long word"),
    config(
        "model: {norm_scheme: " + "x" * 300_000 + "}", "xxx'", "300000 characters", "shorten it", name="a long name"
    ),
    config("? " + "k" * 100_000 + "\n: 1", "unknown section 'kkk", "the sections are model", name="a long key"),
    config("model: {" + "k" * 1000 + ": 1}", "unknown field 'kkk", "in section 'model'", name="a long field"),
    config("# " + "x" * 50_000_000, "50,000,002 bytes", "at most 524,288", "give the path", name="50 MB"),
    config("# " + "x\n" * 300_000, "600,002 bytes", "at most 524,288", "give the path", name="600 KB of comments"),
    # what is no YAML, or no configuration
    config("model: [\n", "line 2", "is not YAML", "correct it", name="unclosed"),
    config("model:\n\tnum_layers: 1\n", "line 2", "is not YAML", "correct it", name="tab"),
    config("model: *a\n", "line 1", "undefined alias", "correct it", name="undefined alias"),
    config("%YAML 9.9\n---\na: 1\n", "is not YAML", "correct it", name="YAML 9.9"),
    config("a: 1\n---\nb: 2\n", "line 2", "document", "correct it", name="two documents"),
    config(b"model: \x00", "is not YAML", "special characters", "correct it", name="NUL byte"),
    config(b"model: {norm_scheme: \xe9}", "is not UTF-8", "byte 21", "save it as UTF-8", name="Latin-1"),
    config("model: {}".encode("utf-16"), "is not UTF-8", "byte 0", "save it as UTF-8", name="UTF-16"),
    config(b"\x89PNG\r\n\x1a\n" + b"\xff" * 1000, "is not UTF-8", "save it as UTF-8", name="a picture"),
    config('data: {tokenizer: "a\\0b"}', "tokenizer='a\\x00b'", "NUL character", "take it out", name="escaped NUL"),
    config('data: {tokenizer: "\\ud800"}', "tokenizer=", "UTF-8", "rename", name="lone surrogate"),
    config(
        "!!python/object/apply:os.system ['touch x']",
        "line 1",
        "python/object/apply:os.system",
        "correct it",
        name="python object",
    ),
    config("model: !!python/name:os.system", "is not YAML", "could not determine a constructor", name="python name"),
    config("model: !foo {num_layers: 2}", "is not YAML", "!foo", "correct it", name="unknown tag"),
    config("data: {tokenizer: !!binary aGVsbG8=}", "tokenizer=b'hello'", "a bytes to YAML", "in quotes", name="binary"),
    config("data: {data_path: !!set {a, b}}", "data_path=", "a set to YAML", "in quotes", name="set"),
    config("data: {tokenizer: 2026-11-29}", "tokenizer=datetime", "a date to YAML", "in quotes", name="date"),
    config("data: {tokenizer: 2026-99-99}", "line 1", "2026-99-99", "month must be", "correct it", name="no date"),
    *(
        config(f"training: {{seed: !!{tag} {text}}}", "line 1", "is not YAML", "correct it", name=f"no {tag} {text}")
        for tag, text in (("int", '""'), ("float", '""'), ("bool", '"maybe"'), ("timestamp", '"soon"'), ("int", "[]"))
    ),
    config("? [model]\n: 1\n", "line 1", "is not YAML", "unhashable", name="a list as a key"),
    config("- a\n", "holds list, not sections", "`model:`", name="a list"),
    config("hello", "holds str, not sections", "`model:`", name="a word"),
    config("42", "holds int, not sections", "`model:`", name="a number"),
    config("1: 2\n", "unknown section 1", "the sections are", name="a number as section"),
    config("~: 2\n", "unknown section None", "the sections are", name="null as section"),
    config("models: {}\n", "unknown section 'models'", "did you mean model?", name="section misspelt"),
    config("num_layers: 4\n", "unknown section 'num_layers'", "below `model:`", name="field as section"),
    config(MODEL * 2, "'model' is in line 1", "again in line 2", "keep one of them", name="section twice"),
    config(
        "model:\n  num_layers: 1\n  num_layers: 2\n", "'num_layers'", "line 2", "line 3", "keep", name="field twice"
    ),
    config("model: [1]\n", "section 'model' holds [1]", "write its fields below", name="list for a section"),
    config("model: 3\n", "section 'model' holds 3", "write its fields below", name="number for a section"),
    config("model: {num_layer: 4}", "unknown field 'num_layer'", "did you mean num_layers?", name="field misspelt"),
    config("model: {1: 4}", "unknown field 1 in section 'model'", "the fields are", name="number as field"),
    config("training: {lr: 1.0}", "unknown field 'lr' in section 'training'", "'optimizer'", name="another section's"),
    config("model: {transformer: [1]}", "model.transformer holds [1]", "below it", name="list for transformer"),
    config(
        "model: {transformer: {num_layers: 1}}",
        "num_layers",
        "write it in section model",
        name="ours below transformer",
    ),
    config("model: {transformer: {quux: 1}}", "unknown TransformerConfig field 'quux'", "no such field", name="quux"),
    # values
    config(
        "model: {num_layers: [4]}", "num_layers=[4]", "section model", "is not an integer", name="list for a number"
    ),
    config("model: {num_layers: {a: 4}}", "num_layers={'a': 4}", "is not an integer", name="mapping for a number"),
    config("model: {num_layers: four}", "num_layers='four'", "is not an integer", "correct", name="word for a number"),
    config("model: {num_layers: 2.5}", "num_layers=2.5", "is not an integer", "correct", name="2.5 layers"),
    config("model: {num_layers: true}", "num_layers=True", "is not an integer", "correct", name="true layers"),
    config("training: {bf16: 1}", "bf16=1", "is not true or false", "correct", name="1 for true"),
    config("training: {bf16: maybe}", "bf16='maybe'", "is not true or false", "correct", name="maybe for true"),
    config("data: {tokenizer: 5}", "tokenizer=5", "is not text", "put it in quotes", name="number for text"),
    config("data: {data_path: 5}", "data_path=5", "is not a list, each text", name="number for a list"),
    config("data: {data_path: [[a]]}", "data_path=[['a']]", "a list, each text", name="list in a list"),
    config("data: {data_path: [~]}", "data_path=[None]", "a list, each text", name="null in a list"),
    config("training: {rampup_batch_size: [1, two, 3]}", "'two'", "a list, each an integer", name="word among numbers"),
    config("model: {normalization: RMS}", "normalization='RMS'", "did you mean RMSNorm?", name="near a choice"),
    config("optimizer: {lr: 1e400}", "lr='1e400'", "is not a number", name="1e400"),
    config("optimizer: {lr: 1.0e+400}", "lr=inf", "not finite", "give a number that is", name="1.0e+400"),
    config("model: {init_method: foo}", "init_method='foo'", "Python object", "leave it out", name="a function"),
    config("checkpoint: {save: ''}", "save=''", "is empty", "leave save out", name="empty save"),
    config("data: {data_path: ['']}", "data_path=['']", "is empty", "leave data_path out", name="empty path in a list"),
    # the file itself
    Row("plan --config run.yaml", ("cannot read run.yaml", "it is a pipe", "give the path"), files={"run.yaml": FIFO}),
    Row(
        f"pretrain {RUN} --config run.yaml",
        ("cannot read run.yaml", "it is a pipe", "give the path of a YAML file"),
        files={"run.yaml": FIFO},
        process=True,
    ),
    Row("sweep --config s.yaml --output o", ("cannot read s.yaml", "it is a pipe", "give the"), files={"s.yaml": FIFO}),
    Row("parity --config run.yaml", ("cannot read run.yaml", "it is a pipe", "give the"), files={"run.yaml": FIFO}),
    Row("plan --config link", ("cannot read link", "it is a pipe", "give"), files={"p": FIFO, "link": Link("p")}),
    Row(
        "plan --config run.yaml", ("run.yaml", "it is a directory", "give the path"), {"run.yaml": DIRECTORY}, name="d"
    ),
    Row("plan --config none.yaml", ("cannot read none.yaml", "No such file", "give the path of a YAML file")),
    Row("plan --config none/run.yaml", ("cannot read none/run.yaml", "No such file", "give the path")),
    Row("plan --config f/run.yaml", ("cannot read f/run.yaml", "Not a directory", "give the path"), files={"f": ""}),
    Row(
        "plan --config gone", ("cannot read gone", "No such file", "a link to nowhere"), files={"gone": Link("nowhere")}
    ),
    Row("plan --config loop", ("cannot read loop", "symbolic links", "give the path"), files={"loop": Link("loop")}),
    Row("plan --config /dev/zero", ("cannot read /dev/zero", "it is a device", "give the path")),
    Row("plan --config ''", ("cannot read ''", "names no file", "give the path of a YAML file")),
    Row("plan --config", ("--config has no value", "write --config VALUE")),
    Row("plan --config a --config b", ("--config a", "--config b", "give one YAML file")),
    Row(
        "plan --config", ("cannot read xxx", "File name too long", "give the"), more=("x" * 100_000,), name="long path"
    ),
    Row(
        "plan --config",
        ("cannot read 'a\\x00b'", "no file can be called that", "give the path"),
        more=("a\0b",),
        name="NUL in a path",
    ),
    Row(
        "plan --config",
        ("cannot read '\\ud800'", "no file can be called that", "give the path"),
        more=("\ud800",),
        name="surrogate in a path",
    ),
    config("\x1b[2J: 1", "is not YAML", "special characters", name="escape sequence"),
    config('"\\e[2J": 1', "unknown section '\\x1b[2J'", "the sections are", name="escaped escape sequence"),
]
