"""Words and numbers of each command."""

from __future__ import annotations

from .rows import DIRECTORY, FIFO, RUN, Content, Link, Row

YARN = "--position-embedding-type yarn --yarn-rotary-scaling-factor 4 --yarn-original-max-position-embeddings 8"

SWEEP = "base: {preset: tiny-dense, tokens: 1000}\n"
MODEL = "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --vocab-size 257 --train-iters 4"


def sweep(text: str, *said: str, words: str = "", **options: object) -> Row:
    line = f"sweep --config s.yaml --output out {words}"
    return Row(line, ("s.yaml", *said), files={"s.yaml": text}, **options)  # type: ignore[arg-type]


def generate(words: str, *said: str, **options: object) -> Row:
    return Row(f"generate --checkpoint @export --prompt hello {words}", said, **options)  # type: ignore[arg-type]


def evaluate(words: str, *said: str, files: dict[str, Content] | None = None, **options: object) -> Row:
    return Row(f"evaluate --checkpoint @run {words}", said, files=files or {}, **options)  # type: ignore[arg-type]


PROGRAM = [
    Row("pretrian", ("unknown command 'pretrian'", "did you mean 'pretrain'?"), process=True),
    Row("''", ("unknown command ''", "choose one of")),
    Row("", ("unknown command 'xxx", "choose one of"), more=("x" * 100_000,), name="a command of 100,000 characters"),
    Row("--halp", ("unknown command '--halp'", "choose one of")),
    Row("doctor --jsn", ("unknown flag --jsn", "did you mean --json?")),
    Row("doctor extra", ("unexpected words extra", "belong to no flag")),
    Row("doctor --device gpu", ("--device 'gpu' is not known", "use one of", "cpu")),
    Row("doctor --device cuda", ("cuda", "--device cpu")),
    Row("bench atention", ("unknown measurement 'atention'", "did you mean 'attention'?")),
    Row("bench --halp", ("unknown measurement '--halp'", "choose one of attention")),
    Row("bench decode --batsch 2", ("unknown flag --batsch", "did you mean --batch?")),
    Row("parity --layout tp2", ("unknown flag --layout;", "did you mean --layouts?")),
]

PRETRAIN = [
    Row(f"pretrain {RUN} --num-layer 4", ("unknown flag --num-layer", "did you mean --num-layers?"), process=True),
    Row(f"pretrain {RUN} stray", ("'stray'", "belongs to no flag")),
    Row(f"pretrain {RUN} -lr 1", ("'-lr'", "did you mean --lr?")),
    Row(f"pretrain {RUN} --", ("'--'", "belongs to no flag")),
    Row(f"pretrain {RUN} ''", ("''", "belongs to no flag")),
    Row(f"pretrain {RUN} --lr", ("--lr has no value", "write --lr VALUE")),
    Row(f"pretrain {RUN} --bf16=maybe", ("bf16='maybe'", "is not true or false")),
    Row(f"pretrain {RUN} --no-bf16=1", ("--no-bf16=1", "takes no value", "write --no-bf16 alone")),
    Row(f"pretrain {RUN} --lr 1 --lr=1e", ("lr='1e'", "is not a number")),
    Row(f"pretrain {RUN} --bf16 --fp16", ("bf16=True", "fp16=True", "exclude each other")),
    Row(f"pretrain {RUN} --preset dense-1b", ("preset 'dense-1b' is not known", "did you mean")),
    Row(f"pretrain {RUN} --device cuda", ("cuda", "cpu")),
    Row(f"pretrain {RUN} --device tpu", ("device='tpu'", "one of auto, cpu, cuda")),
    Row(f"pretrain {RUN} --rampup-batch-size '[1,2'", ("rampup_batch_size=", "is not a list", "write the items apart")),
    Row(
        f"pretrain {RUN} --rampup-batch-size",
        ("rampup_batch_size=", "is not a list", "nested more than 40"),
        more=("[" * 5000,),
        name="5,000 brackets in a flag",
    ),
    Row(f"pretrain {RUN} --norm-scheme hybrid_sta", ("hybrid_sta", "hybrid_star")),
    Row(f"pretrain {RUN} --moe-router-topk 2", ("moe_router_topk", "num_moe_experts")),
    Row(f"pretrain {RUN} --cp-comm-type a2a", ("cp_comm_type='a2a'", "all_gather, p2p")),
    *(
        Row(f"pretrain {RUN} --{name} {value}", (f"{name.replace('-', '_')}={value}", said))
        for name, value, said in (
            *((name, "0", "at least 1") for name in ("num-layers", "hidden-size", "seq-length", "micro-batch-size")),
            *((name, "-1", "at least 1") for name in ("train-iters", "save-interval", "keep-last", "log-interval")),
            *((name, "-1", "at least 0") for name in ("seed", "eval-iters", "num-workers", "lr-warmup-iters")),
        )
    ),
    Row(f"pretrain {RUN} --lr -1", ("lr=-1.0", "above 0")),
    Row(f"pretrain {RUN} --min-lr 1", ("min_lr=1.0 is above lr", "lower min_lr")),
    Row(f"pretrain {RUN} --weight-decay -1", ("weight_decay=-1.0", "at least 0")),
    Row(f"pretrain {RUN} --adam-beta1 1", ("adam_beta1=1.0", "below 1")),
    Row(f"pretrain {RUN} --hidden-dropout 1.5", ("hidden_dropout=1.5", "at most 0.99")),
    Row(f"pretrain {RUN} --rotary-percent 0", ("rotary_percent=0.0", "above 0")),
    Row(f"pretrain {RUN} --rotary-percent 1e-9", ("rotary_percent=1e-09 of kv_channels", "below the 2", "at least")),
    *(
        Row(f"pretrain {RUN} --use-rope-scaling --rope-scaling-factor {value}", ("rope_scaling_factor", *said))
        for value, said in (
            ("0", ("at least 1",)),
            ("-2", ("at least 1",)),
            ("1e9", ("at most 1000000",)),
            ("nan", ("nan",)),
            ("inf", ("inf",)),
            ("x", ("x",)),
        )
    ),
    Row(f"pretrain {RUN} --rope-scaling-factor 32", ("rope_scaling_factor=32.0 without", "set use_rope_scaling")),
    Row(f"pretrain {RUN} --position-embedding-type mrope", ("position_embedding_type='mrope'", "rope, yarn")),
    Row(f"pretrain {RUN} --yarn-mscale 0.5", ("yarn_mscale=0.5 without", "set position_embedding_type to yarn")),
    Row(
        f"pretrain {RUN} --position-embedding-type yarn",
        ("without yarn_rotary_scaling_factor", "without yarn_original_max_position_embeddings", "set it, or use rope"),
    ),
    *(
        Row(f"pretrain {RUN} {YARN} {words}", said)
        for words, said in (
            ("--yarn-rotary-scaling-factor 0", ("yarn_rotary_scaling_factor=0.0", "at least 1")),
            ("--yarn-rotary-scaling-factor nan", ("yarn_rotary_scaling_factor", "nan")),
            ("--yarn-original-max-position-embeddings 0", ("yarn_original_max_position_embeddings=0", "at least 1")),
            ("--yarn-beta-slow 0", ("yarn_beta_slow=0.0", "above 0")),
            ("--yarn-beta-fast 1", ("yarn_beta_fast=1.0 is not above yarn_beta_slow=1.0", "raise the first")),
            ("--yarn-mscale -1", ("yarn_mscale=-1.0", "at least 0")),
            (
                "--use-rope-scaling",
                ("use_rope_scaling=True with position_embedding_type='yarn'", "leave one of them out"),
            ),
            ("--rotary-base 1", ("rotary_base=1.0 with position_embedding_type='yarn'", "above 1")),
        )
    ),
    Row(f"pretrain {RUN} --rotary-base 1e-300", ("rotary_base=1e-300", "at least 1")),
    Row(f"pretrain {RUN} --init-method-std 1e-50", ("init_method_std=1e-50", "at least 1e-10")),
    Row(f"pretrain {RUN} --init-method-std 1e38", ("init_method_std=1e+38", "at most 1000")),
    Row(f"pretrain {RUN} --layernorm-epsilon 1e30", ("layernorm_epsilon=1e+30", "at most 1")),
    Row(f"pretrain {RUN} --adam-eps 1e-320", ("adam_eps=1e-320", "at least 1e-30")),
    Row(
        f"pretrain {RUN} --packing first_fit",
        ("packing='first_fit'", "is not one of none, best_fit", "did you mean best_fit"),
    ),
    Row(f"pretrain {RUN} --packing", ("--packing has no value", "write --packing VALUE")),
    Row(f"pretrain {RUN} --num-workers 1024", ("num_workers=1024", "a few are enough", "at most")),
    Row("export --checkpoint ~/run --output out", ("--checkpoint '~/run'", "begins with ~", "write the directory out")),
    Row("prepare --input ~someone/a.txt --output-prefix p", ("--input '~someone/a.txt'", "begins with ~")),
    Row("import --hf-dir ~ --output out", ("--hf-dir '~'", "begins with ~")),
    Row(f"pretrain {RUN} --lr-warmup-fraction 2", ("lr_warmup_fraction=2.0", "is out of range; use")),
    Row(f"pretrain {RUN} --phd-repeat 0", ("phd_repeat", "0")),
    Row(f"pretrain {RUN} --phd-repeat 1000000", ("phd_repeat", "1000000")),
    Row(f"pretrain {RUN} --train-iters 100000000", ("training samples", "passes over it", "train_iters")),
    Row(f"pretrain {RUN} --train-iters 9000000000000000000", ("train_iters=9000000000000000000", "out of range")),
    Row(f"pretrain {RUN} --seed 9223372036854775807", ("seed=9223372036854775807", "out of range")),
    Row(f"pretrain {RUN} --seed 9223372036854775808", ("seed='9223372036854775808'", "64 bits")),
    Row(f"pretrain {RUN} --num-layers 1000000000", ("num_layers=1000000000", "out of range")),
    Row(f"pretrain {RUN} --hidden-size 1000000000", ("hidden_size=1000000000", "out of range")),
    Row(f"pretrain {RUN} --ffn-hidden-size 1000000000", ("ffn_hidden_size=1000000000", "out of range")),
    Row(f"pretrain {RUN} --vocab-size 1000000000000", ("vocab_size=1000000000000", "out of range")),
    Row(f"pretrain {RUN} --num-workers 100000", ("num_workers=100000", "out of range")),
    Row(f"pretrain {RUN} --global-batch-size 1000000000000", ("global_batch_size=1000000000000", "out of range")),
    Row(f"pretrain {RUN} --distributed-timeout-minutes 1e300", ("distributed_timeout_minutes=1e+300", "out of range")),
    Row("pretrain", ("2 problems", "--train-iters N", "--data-path PREFIX")),
]

PLAN = [
    Row("plan", ("3 problems", "num_layers is not set", "--num-layers N")),
    Row(f"plan {MODEL} --rank 2", ("--rank is of a dry run alone", "add --dry-run")),
    Row(f"plan {MODEL} --rankz 2", ("unknown flag --rankz;", "did you mean --rank")),
    Row(f"plan {MODEL} --ranks 2 --gpus 4", ("--ranks 2 and --gpus 4", "give one of them")),
    Row(f"plan {MODEL} --gpus 0", ("--gpus 0", "at least 1")),
    Row(f"plan {MODEL} --dry-run --gpus 4 --rank 4", ("--rank 4 is not in a world of 4", "from 0 to 3")),
    Row(f"plan {MODEL} --dry-run --gpus 4 --rank -1", ("--rank -1 is not in a world of 4", "from 0 to 3")),
    Row(f"plan {MODEL} --dry-run --rank 0 --all-stages", ("--rank 0 and --all-stages", "give one of them")),
    Row(f"plan {MODEL} --dry-run --gpus-per-node 0", ("--gpus-per-node 0", "at least 1")),
    Row(f"plan {MODEL} --dry-run --order", ("--order goes into the file of --json", "add --json")),
    Row(f"plan {MODEL} --dry-run --mfu 0.5", ("--mfu says nothing to a dry run", "leave it out")),
    Row(f"plan {MODEL} --dry-run --json nowhere/x", ("cannot write nowhere/x", "existing one")),
    Row(f"plan {MODEL} --dry-run --expert-imbalance 2", ("--expert-imbalance 2", "no experts", "leave it out")),
    Row(
        f"plan {MODEL} --dry-run --gpus 3 --tensor-model-parallel-size 2",
        ("world size 3", "start 2 or 4 ranks"),
    ),
    Row(f"plan {MODEL} --ranks 0", ("--ranks 0", "at least 1")),
    Row(f"plan {MODEL} --ranks x", ("--ranks 'x' is not an integer", "correct it")),
    Row(f"plan {MODEL} --ranks 100000000000000000000", ("--ranks 100000000000000000000", "64 bits", "smaller")),
    Row(f"plan {MODEL} --mean-document-length 0.5", ("--mean-document-length 0.5", "use a number from 1 on")),
    Row(f"plan {MODEL} --mean-document-length nan", ("--mean-document-length nan", "use a finite number")),
    Row(f"plan {MODEL} --mean-document-length 99", ("--mean-document-length 99", "add --reset-attention-mask")),
    Row(f"plan {MODEL} --mfu 2", ("--mfu 2.0", "above 0 and at most 1")),
    Row(f"plan {MODEL} --mfu nan", ("--mfu nan", "not finite")),
    Row(f"plan {MODEL} --num-layer 2", ("unknown flag --num-layer", "did you mean --num-layers?")),
    Row("plan --preset ''", ("preset", "is not known")),
    Row("plan --num-layers 2 --hidden-size 15 --num-attention-heads 2 --vocab-size 9 --train-iters 1", ("15", "use")),
]

GENERATE = [
    Row("generate --prompt x", ("--checkpoint not given", "it is needed", "--help")),
    Row("generate --checkpoint @export", ("--prompt not given", "it is needed", "--help")),
    Row("generate --checkpoint none --prompt x", ("none holds no complete checkpoint", "give the directory of --save")),
    Row("generate --checkpoint f --prompt x", ("f", "directory"), files={"f": ""}),
    Row("generate --checkpoint '' --prompt x", ("--checkpoint", "is empty", "give a value")),
    Row("generate --checkpoint @export --prompt ''", ("--prompt", "is empty", "give a value")),
    generate("--max-new-tokens 0", "max_new_tokens=0", "at least 1"),
    generate("--max-new-tokens -5", "max_new_tokens=-5", "at least 1"),
    generate("--max-new-tokens many", "--max-new-tokens 'many' is not an integer", "correct it"),
    generate("--max-new-tokens 1000000000000", "max_new_tokens=1000000000000", "at most"),
    generate("--max-new-tokens " + "9" * 30, "--max-new-tokens 999", "64 bits", name="30 digits of new tokens"),
    generate("--temperature 0", "temperature=0.0", "at least 1e-6"),
    generate("--temperature -1", "temperature=-1.0", "at least 1e-6"),
    generate("--temperature nan", "--temperature nan", "not finite", "use a finite number"),
    generate("--temperature inf", "--temperature inf", "not finite", "use a finite number"),
    generate("--temperature 1e-320", "temperature=", "at least"),
    generate("--temperature hot", "--temperature 'hot' is not a number", "correct it"),
    generate("--top-k 0", "top_k=0", "at least 1"),
    generate("--top-k 1.5", "--top-k '1.5' is not an integer", "correct it"),
    generate("--top-p 0", "top_p=0.0", "above 0 and at most 1"),
    generate("--top-p 1.5", "top_p=1.5", "above 0 and at most 1"),
    generate("--top-p nan", "--top-p nan", "not finite"),
    generate("--top-p 1 --seed 18446744073709551616", "--seed 18446744073709551616", "64 bits", "smaller"),
    generate("--greedy --top-k 5", "--greedy", "exclude each other", "keep one"),
    generate("--device cuda", "--device cuda", "no CUDA device", "--device cpu"),
    generate("--device tpu", "--device 'tpu' is not known", "use one of", "cpu"),
    generate("--decode-kernel magic", "--decode-kernel 'magic'", "use one of", "torch"),
    generate("--max-tokens 5", "unknown flag --max-tokens", "did you mean --max-new-tokens?"),
    generate("hello", "unexpected words hello", "put text with spaces in quotes"),
]

SERVE = [
    Row("serve", ("HF_DIR_OR_CHECKPOINT not given", "it is needed", "--help")),
    Row("serve none --port 0", ("none holds no complete checkpoint", "give the directory of --save")),
    Row("serve @export --prot 1", ("unknown flag --prot", "did you mean --port?")),
    Row("serve @export --port 65536", ("--port 65536", "at most 65535")),
    Row("serve @export --port -1", ("--port -1", "at least 0")),
    Row("serve @export --host 256.0.0.1", ("--host '256.0.0.1'", "no address here", "use one of")),
    Row("serve @export --port 0 --host 192.0.2.1", ("192.0.2.1:0", "cannot be listened on", "use another")),
    Row("serve @export --max-batch-size 0", ("--max-batch-size 0", "at least 1")),
    Row("serve @export --max-batch-size many", ("--max-batch-size 'many' is not an integer", "correct it")),
    Row("serve @export --max-queue -1", ("--max-queue -1", "at least 0")),
    Row("serve @export --max-body-bytes 1", ("--max-body-bytes 1", "at least 1,024")),
    Row("serve @export --shutdown-seconds -1", ("--shutdown-seconds -1.0", "at least 0")),
    Row("serve @export --shutdown-seconds nan", ("--shutdown-seconds nan", "not finite")),
    Row("serve @export --port 0 --max-model-len 1", ("--max-model-len 1", "at least 2")),
    Row("serve @export --port 0 --max-model-len 17", ("--max-model-len 17", "16 positions", "at most that")),
    Row("serve @export --port 0 --device cuda", ("--device cuda", "no CUDA device", "--device cpu")),
    Row("serve @export --decode-kernel magic", ("--decode-kernel 'magic'", "use one of", "torch")),
    Row("serve @export --api-key x", ("unknown flag --api-key", "the flags are")),
    Row("serve @export --model-name ''", ("--model-name", "is empty", "give a value")),
]

CHAT = [
    Row("chat", ("HF_DIR_OR_CHECKPOINT not given", "it is needed", "--help")),
    Row("chat none", ("none holds no complete checkpoint", "give the directory of --save")),
    Row("chat @export --max-new-tokens 0", ("max_new_tokens=0", "at least 1")),
    Row("chat @export --temperature 0", ("temperature=0.0", "at least 1e-6")),
    Row("chat @export --top-p 2", ("top_p=2.0", "above 0 and at most 1")),
    Row("chat @export --system ''", ("--system", "is empty", "give a value")),
    Row("chat @export --system be-brief", ("--system needs a chat template", "leave it out")),
    Row("chat @export --max-model-len 17", ("--max-model-len 17", "16 positions")),
]

TEMPLATES = [
    Row("export --checkpoint @run --output out --chat-template none", ("none", "No such file", "Jinja")),
    Row(
        "export --checkpoint @run --output out --chat-template t",
        ("t is empty", "give the Jinja text"),
        files={"t": " "},
    ),
    Row(
        "export --checkpoint @run --output out --verify none --chat-template t",
        ("t: the chat template makes no text", "change"),
        files={"t": "{% for m in messages %}"},
    ),
    Row(
        "export --checkpoint @run --output out --verify none --chat-template t",
        ("t: of a conversation of two turns it leaves out question-one", "says every message"),
        files={"t": "{{ messages[-1].content }}"},
        name="a template that forgets",
    ),
    Row(
        "export --checkpoint @run --output out --to megatron --chat-template t",
        ("--chat-template with --to megatron", "no effect", "leave that out"),
        files={"t": "x"},
    ),
]

EVALUATE = [
    Row("evaluate", ("--checkpoint not given", "it is needed")),
    Row("evaluate --checkpoint none", ("none holds neither", "give pretrain's --save directory")),
    Row("evaluate --checkpoint f", ("f", "directory"), files={"f": ""}),
    evaluate("--data-path none", "none", "phd-megatron prepare"),
    evaluate("--data-path ''", "--data-path", "is empty", "leave --data-path out"),
    evaluate("--num-samples 0", "--num-samples 0", "at least 1"),
    evaluate("--num-samples 1000000000", "--num-samples 1000000000", "ask for at most that"),
    evaluate("--num-samples all", "--num-samples 'all' is not an integer", "correct it"),
    evaluate("--seq-length 0", "--seq-length 0", "at least 1"),
    evaluate("--seq-length 1000000", "--seq-length 1000000", "use at most that"),
    evaluate("--micro-batch-size -1", "--micro-batch-size -1", "at least 1"),
    evaluate("--micro-batch-size 1000000000", "--micro-batch-size 1000000000", "use at most 65,536"),
    evaluate("--split a", "split 'a'", "969,30,1"),
    evaluate("--subset all", "--subset 'all' is not known", "use one of", "valid"),
    evaluate("--layout tp3x", "tp3x", "layout"),
    evaluate("--layout tp2", "tensor 2", "world size 1", "start 2 ranks"),
    evaluate("--layout tp99999999999999999999", "tensor 99999999999999999999", "change one of these sizes"),
    evaluate("--device cuda", "cuda", "cpu"),
    evaluate("--json d", "cannot write d", "it is a directory", "choose another --json", files={"d": DIRECTORY}),
    evaluate("--json p", "cannot write p", "pipe", "choose another --json", files={"p": FIFO}),
    evaluate("--json none/x.json", "cannot write none/x.json", "is no directory", "give a file in an existing one"),
    evaluate("--json f/x.json", "cannot write f/x.json", "is no directory", files={"f": ""}),
    evaluate("--json gone", "cannot write gone", "is no directory", files={"gone": Link("no/where")}),
    evaluate("--json ''", "--json", "is empty", "leave --json out"),
    evaluate("--json", "File name too long", "cannot write nnn", more=("n" * 300,), name="a long report"),
    Row("evaluate --checkpoint @export --copies", ("--copies", "give the Megatron checkpoint")),
    Row("evaluate --checkpoint @export --layout tp2", ("Hugging Face directory", "start without torchrun")),
]

IMPORT = [
    Row("import --hf-dir @hf", ("--output not given", "it is needed")),
    *(
        Row(f"import --hf-dir @hf --output out --{name} {value}", (name, value))
        for name, value in (
            ("phd-repeat", "0"),
            ("phd-repeat", "-1"),
            ("phd-window", "0"),
            ("seq-length", "0"),
            ("upcycle-experts", "0"),
            ("make-vocab-size-divisible-by", "0"),
            ("phd-repeat", "two"),
        )
    ),
    Row(
        "import --hf-dir @hf --output out --moe-router-topk 2", ("--moe-router-topk", "--upcycle-experts", "give both")
    ),
    Row("import --hf-dir @hf --output out --upcycle-experts 2 --moe-router-topk 5", ("5", "2")),
    Row(
        "import --hf-dir @hf --output out --upcycle-experts 1000000000",
        ("--upcycle-experts 1000000000", "use a number from 1 to 16,384"),
    ),
    Row("import --hf-dir @hf --output out --seq-length 1000000000", ("1000000000", "positions")),
    Row("import --hf-dir @hf --output out --phd-copy-positions some", ("'some' is not known", "use one of", "token")),
    Row("import --hf-dir @hf --output ''", ("--output", "is empty", "give a value")),
    Row("import --hf-dir '' --output out", ("--hf-dir", "is empty", "give a value")),
]

SWEEPS = [
    Row("sweep", ("--config not given", "it is needed")),
    Row("sweep --confg s.yaml --output out", ("unknown flag --confg", "did you mean --config?")),
    Row("sweep begin", ("unknown action 'begin' of sweep", "use status, report, member")),
    Row("sweep reprot x", ("unknown action 'reprot' of sweep", "did you mean report?")),
    Row("sweep status none", ("none is no sweep", "give the --output of a sweep")),
    Row("sweep report none", ("none is no sweep", "give the --output of a sweep")),
    Row("sweep member none x", ("none is no sweep", "give the --output of a sweep")),
    Row("sweep status f", ("f is no sweep", "give the --output of a sweep"), files={"f": ""}),
    Row("sweep status d", ("d/plan.json", "cannot be read", "start the sweep again"), files={"d/plan.json": "["}),
    Row("sweep report d", ("d/plan.json", "cannot be read"), files={"d/plan.json": "[]"}),
    Row("sweep report d", ("d/plan.json", "cannot be read"), {"d/plan.json": '{"entries": 5}'}, name="entries: 5"),
    Row("sweep status d", ("d/plan.json", "pipe"), files={"d/plan.json": FIFO}, name="a pipe as plan"),
    Row("sweep status d", ("d/plan.json", "directory"), files={"d/plan.json": DIRECTORY}, name="a directory as plan"),
    Row(
        "sweep status d", ("d/plan.json", "cannot be read"), files={"d/plan.json": "[" * 100_000}, name="plan brackets"
    ),
    sweep(SWEEP, "has no members", "write axes below `grid:`", name="sweep without members"),
    sweep(SWEEP + "grids: {seed: [1]}\n", "unknown key 'grids'", "did you mean grid?", name="grids"),
    sweep(SWEEP + "grid: [seed]\n", "'seed'", "write its entries below", name="a word as grid"),
    sweep(SWEEP + "grid: {seed: 1}\n", "1 is no axis", "write a list of values", name="a number as axis"),
    sweep(SWEEP + "grid: {seed: []}\n", "[] is no axis", "write a list of values", name="an empty axis"),
    sweep(SWEEP + "grid: {seed: [1, 1]}\n", "names a value twice", name="an axis with a value twice"),
    sweep(SWEEP + "grid: {seed: [one]}\n", "seed='one'", "is not an integer", name="a word in an axis"),
    sweep(SWEEP + "grid: {sead: [1]}\n", "unknown field 'sead'", "did you mean seed?", name="sead"),
    sweep(SWEEP + "grid: {save: [a]}\n", "save is set by the sweep", "leave it out", name="an axis of save"),
    sweep(SWEEP + "grid: {lr: [.nan]}\n", "lr=nan", "give a number that is", name="nan in an axis"),
    sweep(SWEEP + "members: 5\n", "5 is no list", "write one member a line", name="members: 5"),
    sweep(SWEEP + "members: [5]\n", "5 is no member", "write its fields", name="a number as member"),
    sweep(SWEEP + "members: [{name: ../x, seed: 1}]\n", "'../x' cannot name a directory", "use letters", name="../x"),
    sweep(SWEEP + "members: [{name: a, seed: 1}, {name: a, seed: 2}]\n", "called 'a'", "another `name`", name="twins"),
    sweep("base: 5\ngrid: {seed: [1]}\n", "base holds 5", "write its entries below", name="base: 5"),
    sweep("base: {tokens: many}\ngrid: {seed: [1]}\n", "tokens='many'", "is not a number", name="tokens: many"),
    sweep("base: {tokens: 0}\ngrid: {seed: [1]}\n", "tokens=0", "training budget", name="tokens: 0"),
    sweep("base: {tokens: .inf}\ngrid: {seed: [1]}\n", "tokens=inf", "give a number that is", name="tokens: .inf"),
    Row(
        "sweep --config s.yaml --output out",
        ("cannot read none.yaml", "No such file", "give the path of a YAML file"),
        files={"s.yaml": "base: {config: none.yaml}\ngrid: {seed: [1]}\n"},
        name="a base that is no file",
    ),
    sweep(
        SWEEP + "grid: {seed: [1]}\nbaseline: {seed: 2}\n", "seed=2 is not on that axis", "use one of", name="baseline"
    ),
    sweep(
        SWEEP + "grid: {seed: [1]}\nsize_axis: size\n", "size_axis='size' is no axis", "use one of", name="size axis"
    ),
    sweep(SWEEP + "grid: {seed: [1]}\nsize_axis: [a]\n", "size_axis=['a']", "use one of", name="a list as size axis"),
    sweep(SWEEP + "grid: {seed: [1]}\nlauncher: {kind: k8s}\n", "kind='k8s'", "one of local, slurm", name="kind"),
    sweep(
        SWEEP + "grid: {seed: [1]}\nlauncher: {parallel: many}\n", "parallel='many'", "integer", name="parallel: many"
    ),
    sweep(
        SWEEP + "grid: {seed: [1]}\nlauncher: {rank: 2}\n", "unknown option 'rank'", "did you mean ranks?", name="rank"
    ),
    sweep(
        SWEEP + "grid: {" + ", ".join(f"axis{i}: {{a: {{}}, b: {{}}, c: {{}}}}" for i in range(40)) + "}\n",
        "12157665459056928801 members",
        "at most 10,000",
        name="a product of 40 axes",
    ),
    Row(
        "sweep --config s.yaml --parallel 0",
        ("parallel=0", "at least 1"),
        files={"s.yaml": SWEEP + "grid: {seed: [1]}"},
    ),
    Row("sweep --config s.yaml --ranks x", ("--ranks 'x' is not an integer",) * 2, files={"s.yaml": SWEEP}),
    Row(
        "sweep --config s.yaml --output f/out --data-path @data",
        ("f/out", "cannot"),
        files={"s.yaml": SWEEP + "grid: {seed: [1]}", "f": ""},
        name="a sweep below a file",
    ),
]

OTHERS = [
    Row("parity", ("data_path is not set", "give --data-path PREFIX")),
    Row("parity --layouts tpx", ("tpx", "layout")),
    Row("parity --layouts ''", ("--layouts", "is empty", "leave --layouts out")),
    Row("parity --max-ranks 0", ("--max-ranks 0", "use 1 or more")),
    Row("parity --max-ranks x", ("--max-ranks 'x' is not an integer", "correct it")),
    Row("parity --json none/x", ("cannot write none/x", "is no directory", "give a file in an existing one")),
    Row(
        "parity --markdown d",
        ("cannot write d", "it is a directory", "choose another --markdown"),
        files={"d": DIRECTORY},
    ),
    Row("parity --work-dir d", ("--work-dir d", "not empty", "give a new directory"), files={"d/x": ""}),
    Row("parity --work-dir f", ("--work-dir f", "directory"), files={"f": ""}),
    Row("parity --num-layer 2", ("unknown flag --num-layer", "did you mean --num-layers?")),
    Row("compare @metrics", ("not given", "it is needed")),
    Row("compare none @metrics", ("none is no metrics file", "give the file of --metrics-file")),
    Row("compare @metrics @metrics", ("both runs are called", "name them")),
    Row("compare p @metrics", ("p is no metrics file", "give the file"), files={"p": FIFO}),
    Row("compare d @metrics", ("d is no metrics file", "give the file"), files={"d": DIRECTORY}),
    Row("compare a=f @metrics", ("f is empty", "has not logged"), files={"f": ""}),
    Row("compare a=f @metrics", ("f:1 is no line of a metrics file",) * 2, files={"f": "[]\n"}, name="list line"),
    Row("compare a=f @metrics", ("f:1 is no line", "no line of a metrics"), files={"f": "{\n"}, name="broken line"),
    Row(
        "compare a=f @metrics",
        ("f", "consumed_tokens", "train again"),
        {"f": '{"iteration":1,"consumed_samples":1}'},
        name="an old metrics file",
    ),
    Row(
        "compare a=f @metrics",
        ("iteration='x'", "is no number"),
        files={"f": '{"iteration":"x","consumed_samples":1,"consumed_flops":1,"lm_loss":"a"}'},
        name="words for numbers",
    ),
    Row(
        "compare a=f @metrics",
        ("f:1 is no line", "metrics file"),
        files={"f": b"\xff\xfe"},
        name="a metrics file that is not UTF-8",
    ),
    Row("compare a=f @metrics", ("f:1", "no line"), files={"f": "[" * 100_000}, name="brackets for a metrics file"),
    Row("compare a=@metrics b=@metrics --output f", ("cannot make --output f", "choose another"), files={"f": ""}),
    Row("compare a=@metrics b=@metrics --output ''", ("--output", "is empty", "leave --output out")),
    Row("bench attention --seq-length 0", ("--seq-length 0", "use 1 or more")),
    Row("bench attention --heads 3 --kv-heads 2", ("--heads 3", "--kv-heads 2", "change one of them")),
    Row("bench attention --device cuda", ("--device cuda", "use --device cpu")),
    Row("bench attention --device abacus", ("abacus", "use cpu or cuda")),
    Row("bench attention --dtype int8", ("--dtype 'int8' is not known", "use one of")),
    Row("bench attention --seq-length 1000000000", ("--seq-length 1000000000", "not enough memory", "lower lengths")),
    Row("bench attention --json f/x", ("cannot make", "f", "choose another --json"), files={"f": ""}),
    Row("bench decode --kv-length 0", ("--kv-length 0", "use 1 or more")),
    Row(
        "bench decode --plot d",
        ("cannot write d", "it is a directory", "choose another --plot"),
        files={"d": DIRECTORY},
    ),
    Row("bench documents --mean-document-length 0", ("--mean-document-length 0", "use 1 or more")),
    Row("bench norm-rope --norms x", ("--norms x", "name some of q, k and v")),
    Row("bench norm-rope --rows -1", ("--rows -1", "use 1 or more")),
    Row("bench generate --repeats 1", ("--repeats [1]", "2 or more")),
    Row("bench generate --steps 0", ("--steps 0", "use 1 or more")),
    Row("bench generate --norm-scheme x", ("norm_scheme", "x")),
    Row("bench generate --device cuda", ("--device cuda", "use --device cpu")),
    Row("bench generate --device abacus", ("abacus", "use cpu or cuda")),
    Row("bench generate --num-attention-heads 3", ("3", "num_attention_heads")),
    Row("bench train --size huge", ("--size 'huge' is not known", "use one of", "quickstart")),
    Row("bench train --rounds 0", ("--rounds 0", "1 or more")),
    Row("bench train --repeat -1", ("--repeat -1", "1 or more")),
    Row("bench train --norm-scheme x", ("norm_scheme", "x")),
    Row("bench train --preset nope", ("preset 'nope' is not known",) * 2),
    Row("bench train --preset tiny-dense --members x", ("--members x", "is none of")),
    Row("bench train --preset tiny-dense --options '--x 1'", ("unknown flag --x", "--help")),
    Row('bench train --preset tiny-dense --options "\'"', ("--options", "close the quotation")),
]

COMMANDS = [*PROGRAM, *PRETRAIN, *PLAN, *GENERATE, *SERVE, *CHAT, *TEMPLATES, *EVALUATE, *IMPORT, *SWEEPS, *OTHERS]
