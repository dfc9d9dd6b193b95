#!/usr/bin/env bash
# The whole path on real text, without a GPU: bash launch_scripts/quickstart.sh [RUN_DIRECTORY]
#
# Makes the environment, prepares the standard library's sources of the running Python, trains a hybrid_star
# PHD-CSWA-2-16-32 model on two ranks, stops half way, resumes, trains two baselines on the same batches, draws the loss
# curves, exports to Hugging Face and generates from the export.
#
#   PHD_ITERS=2000 bash launch_scripts/quickstart.sh    a longer run (default 200 steps of 4096 tokens)
#   PHD_DEVICE=cuda bash launch_scripts/quickstart.sh   on two GPUs
set -euo pipefail
invoked_from="$PWD"
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

began=$SECONDS
phd_environment tensorboard
set_up=$((SECONDS - began))

run="${1:-$ROOT/runs/quickstart}"
[[ "$run" == /* ]] || run="$invoked_from/$run"
iters="${PHD_ITERS:-200}"
half=$((iters / 2))
((half >= 1)) || phd_fail "PHD_ITERS=$iters: the run is stopped half way, so it needs 2 steps or more"
config="$ROOT/examples/quickstart_phd.yaml"

# Earlier results of this script are replaced; anything else is left alone.
if [[ -d "$run" && ! -e "$run/.quickstart" && -n "$(ls -A "$run")" ]]; then
    phd_fail "$run exists and was not made by this script; name another directory: bash $0 DIRECTORY"
fi
mkdir -p "$run"
touch "$run/.quickstart"
rm -rf "$run"/{phd,hybrid_star,pre,hf,losses.png,summary.json}

# Two ranks share the cores; more threads than cores make small matrices slower.
cores="$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores >= 4 ? cores / 2 : 1))}"
# The checkout's folder kernels/ must not be importable as a package of that name.
export PYTHONSAFEPATH=1 CUDA_DEVICE_MAX_CONNECTIONS=1 TOKENIZERS_PARALLELISM=false
# Megatron-Core calls collectives by names that newer torch versions are about to rename.
export PYTHONWARNINGS="ignore::FutureWarning:torch.distributed.c10d_logger"

phd() { "$PYTHON" -m phd_megatron "$@"; }

# pretrain NAME [OPTIONS]: one start of a training run under torchrun, in $run/NAME. The resolved configuration, a
# hundred lines, goes into the log file only.
pretrain() {
    local name="$1"
    shift
    mkdir -p "$run/$name"
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 -m phd_megatron pretrain \
        --config "$config" --device "${PHD_DEVICE:-cpu}" --data-path "$run/data/stdlib" \
        --train-iters "$iters" --eval-interval "$half" --save "$run/$name/checkpoints" \
        --metrics-file "$run/$name/metrics.jsonl" "$@" 2>&1 |
        tee -a "$run/$name/log.txt" |
        grep --line-buffered -vE '^ +([a-z_0-9]+:|- )|^[a-z]+:$|^resolved configuration|^$'
}

phd_say "1/7 prepare: the standard library as bytes"
if [[ ! -e "$run/data/stdlib.meta.json" ]]; then
    "$PYTHON" tools/stdlib_corpus.py "$run/corpus"
    # A few files of the library's own tests are not valid text on purpose.
    phd prepare --input "$run/corpus" --output-prefix "$run/data/stdlib" --tokenizer byte --workers "$cores" \
        --on-decode-error skip
else
    echo "kept from the last time: $run/data/stdlib"
fi

phd_say "2/7 pretrain hybrid_star PHD-CSWA-2-16-32 on two ranks (TP=2), stop after $half of $iters steps"
pretrain phd --exit-interval "$half"

phd_say "3/7 resume from the checkpoint"
pretrain phd --load "$run/phd/checkpoints"

phd_say "4/7 the same size and the same batches: hybrid_star without PHD, then pre-norm"
pretrain hybrid_star --phd-repeat 1
pretrain pre --phd-repeat 1 --norm-scheme pre

runs=("pre=$run/pre/metrics.jsonl" "hybrid_star=$run/hybrid_star/metrics.jsonl"
    "hybrid_star + PHD=$run/phd/metrics.jsonl")

phd_say "5/7 loss curves"
"$PYTHON" tools/plot_losses.py "${runs[@]}" --output "$run/losses.png" --seq-length 256 --unit "nats per byte" \
    --title "The standard library as bytes, 1.2 M parameters, PHD-CSWA-2-16-32"

phd_say "6/7 export to Hugging Face"
phd export --checkpoint "$run/phd/checkpoints" --output "$run/hf"

phd_say "7/7 generate from the export"
phd generate --checkpoint "$run/hf" --prompt "def main(" --max-new-tokens 120

echo
"$PYTHON" tools/summarise_runs.py "${runs[@]}" --title "after $iters steps on the same batches" \
    --json "$run/summary.json"
cat <<END

where everything is
  corpus, data      $run/corpus, $run/data/stdlib.{bin,idx}
  checkpoints       $run/phd/checkpoints (resume, export and generate need this directory alone)
  logs, metrics     $run/{phd,hybrid_star,pre}/{log.txt,metrics.jsonl}
  loss curves       $run/losses.png
  Hugging Face      $run/hf   (AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True))
set-up $set_up s, everything $((SECONDS - began)) s

A model this small and a run this short show that the path works, not how the methods compare at scale.
END
