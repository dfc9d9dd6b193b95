#!/usr/bin/env bash
# Everything that needs a GPU, unattended: check, then measure. Results go to $OUT (default runs/gpu), each as soon as it
# is there. It uses the python on PATH, with the product's requirements already there; nothing is installed.
#
#   bash tests/gpu/run.sh first      correctness: kernels, models, Transformer Engine and FP8, waits, CUDA graphs
#   bash tests/gpu/run.sh second     training steps, bfloat16, FP8, CUDA graphs, experts; generation and decoding
#   bash tests/gpu/run.sh third      attention, norm and RoPE
#   bash tests/gpu/run.sh copies     copies told apart: parity, and what a step costs
#   bash tests/gpu/run.sh paired     a paired comparison of trainings, three seeds, on all GPUs that are visible
#   bash tests/gpu/run.sh evidence   the next trainings of docs/results/trained/queue.yaml (how.md beside it)
#   bash tests/gpu/run.sh layouts    over several GPUs: parity of layouts, FP8, resharding, a killed rank
#   bash tests/gpu/run.sh PART...    parts by name: the functions below
#
# first, second and third take about ten minutes each on an H100 with 16 idle cores, and no part takes more than its
# limit. On several GPUs they can run side by side, each with its CUDA_VISIBLE_DEVICES and OUT; two on one GPU run out of
# memory and spoil each other's times.
# Parts are called by their names.
# shellcheck disable=SC2329
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
out=${OUT:-runs/gpu}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 CUDA_DEVICE_MAX_CONNECTIONS=1
status=0
memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -n 1)

phd() { # LIMIT NAME ARGUMENTS...; prints and keeps what it says
    timeout "$1" python3 -W ignore -m phd_megatron "${@:3}" 2>&1 | tee "$out/$2.txt" || { status=1; echo "$2 failed"; }
}
check() { # LIMIT PYTEST ARGUMENTS...
    timeout "$1" python3 -m pytest -q -rA -W ignore -p no:cacheprovider "${@:2}" 2>&1 | tee -a "$out/tests.txt" || status=1
}
# Room for a 1.2B model with K = 3: two samples on 80 GB (51 GiB planned), four on 141 GB (82 GiB).
samples=$((memory > 120000 ? 4 : 2))

# What is tested is the result, so nothing is tuned; the first compilation of each case takes seconds.
kernel_tests() {
    PHD_TRITON_TUNE=0 check 200 -n "${PHD_TEST_WORKERS:-8}" tests/gpu/test_cuda_kernels.py tests/gpu/test_cuda_triton.py
}
# Packages that may be there: flash-attn, deepspeed, apex. What is not installed is skipped, with the reason.
causal_tests() { check 240 -n "${PHD_TEST_WORKERS:-6}" tests/gpu/test_cuda_causal.py; }
weight_gradient_tests() { check 100 -s tests/gpu/test_cuda_weight_gradient.py; }
deepspeed_tests() { check 300 -s tests/gpu/test_cuda_deepspeed.py; }
paged_tests() { check 60 tests/gpu/test_cuda_paged_attention.py; }
model_tests() { check 240 tests/gpu/test_cuda_parity.py; }
sync_tests() { check 120 -n 4 tests/gpu/test_cuda_sync.py; }
te_tests() { check 240 -s tests/gpu/test_cuda_te.py; }
graph_tests() { check 300 -s tests/gpu/test_cuda_graph_step.py; }
copies() { # RoPE positions and vectors of copies: parity, then what a step costs beside the same K without them
    check 150 tests/gpu/test_cuda_parity.py -k told-apart
    check 240 tests/gpu/test_cuda_copies.py
    phd 170 train_copies bench train --preset dense-1.2b --members K=2 K=2+vector K=2+repeated K=2+vector+repeated \
        --micro-batch-size "$samples" --rounds 12 --json "$out/train_copies.json"
}
doctor() { phd 30 doctor doctor; }
train() {
    phd 170 train_k bench train --preset dense-1.2b --members vanilla K=2 K=3 --micro-batch-size "$samples" \
        --json "$out/train_k.json"
    phd 100 train_star bench train --preset dense-1.2b --members vanilla hybrid_star --micro-batch-size 4 \
        --json "$out/train_star.json"
    phd 170 train_fp8 bench train --preset dense-1.2b --members vanilla delayed tensorwise blockwise \
        --micro-batch-size 4 --json "$out/train_fp8.json"
}
graphs() { # a step with many launches for little work, and full ones; each eager and as a CUDA graph
    phd 100 train_graph_1 bench train --preset dense-1.2b --micro-batch-size 1 --members vanilla vanilla+graph K=2 \
        K=2+graph --json "$out/train_graph_1.json"
    phd 140 train_graph_4 bench train --preset dense-1.2b --micro-batch-size 4 --members vanilla vanilla+graph delayed \
        delayed+graph tensorwise tensorwise+graph --json "$out/train_graph_4.json"
}
experts_tests() { check 200 -n 4 tests/gpu/test_cuda_experts.py; check 120 -n 4 tests/gpu/test_cuda_sync.py -k experts; }
experts() { # as many layers as fit with their optimizer state; all 64 experts on one GPU
    train_experts 1 4 vanilla te vanilla+graph
    train_experts 8 3 vanilla vanilla+graph te hybrid_star+graph K=2+graph
    # FP8 with 1,024 rows an expert and with 4,096
    train_experts 8 3 vanilla+graph tensorwise+graph te+tensorwise
    train_experts 8 3 vanilla+graph tensorwise+graph te+tensorwise --num-experts 16
    # few wide experts, and many narrow ones
    train_experts 8 3 vanilla+graph te+tensorwise --num-experts 16 --moe-router-topk 2 --moe-ffn-hidden-size 4096
    train_experts 8 3 vanilla+graph --num-experts 256 --moe-ffn-hidden-size 256
}
train_experts() { # MICROBATCHES ROUNDS MEMBERS... --OPTIONS...
    local count=$1 rounds=$2 name members=()
    shift 2
    while (($#)) && [[ "$1" != --* ]]; do members+=("$1") && shift; done
    name="train_moe_${count}_${members[*]}_$*"
    name=${name//[^a-zA-Z0-9_]/-}
    phd 300 "$name" bench train --preset moe-1b-7b --members "${members[@]}" --rounds "$rounds" --accumulate "$count" \
        --json "$out/$name.json" --micro-batch-size "$((memory > 120000 ? 2 : 1))" \
        --options "--num-layers $((memory > 120000 ? 12 : 6)) --expert-model-parallel-size 1 $*"
}
experts_run() { # the real router on real text: corpus as evidence's (docs/results/trained/how.md)
    phd 300 pretrain_moe pretrain --preset moe-1b-7b --num-layers "$((memory > 120000 ? 12 : 6))" --train-iters 60 \
        --expert-model-parallel-size 1 --micro-batch-size "$((memory > 120000 ? 2 : 1))" --global-batch-size 16 --lr 3e-4 \
        --lr-warmup-iters 10 --eval-iters 0 --log-interval 5 --data-path "${PHD_EXPERTS_DATA:?prefix of tokenised text}" \
        --cuda-graph-impl local --cuda-graph-scope full_iteration --overlap-grad-reduce false \
        --overlap-param-gather false --metrics-file "$out/pretrain_moe.jsonl"
}
flash_attn() { # vendors' operators beside each other; then all of PHD as one masked call
    for width in 64 128; do
        phd 160 "flash_attn_d$width" bench attention --seq-length 4096 16384 32768 --head-dim "$width" --repeat 2 3 \
            --heads 16 --kv-heads 4 --dtype bfloat16 --rounds 5 --only-phd --backends sdpa_triton \
            --causal-kernels cudnn "flash-attn 4" --json "$out/flash_attn_d$width.json"
    done
    phd 160 flash_attn_flex bench attention --seq-length 16384 --head-dim 128 --repeat 2 --heads 16 --kv-heads 4 \
        --dtype bfloat16 --rounds 3 --only-phd --backends sdpa_triton flex --causal-kernels cudnn "flash-attn 4" \
        --json "$out/flash_attn_flex.json"
}
zero() { # DeepSpeed's engine beside Megatron-Core's
    local name members=() host='{"device": "cpu", "pin_memory": true}'
    echo '{"zero_optimization": {"stage": 1}}' > "$out/zero1.json"
    echo '{"zero_optimization": {"stage": 3}}' > "$out/zero3.json"
    echo "{\"zero_optimization\": {\"stage\": 2, \"offload_optimizer\": $host}}" > "$out/states.json"
    for name in zero1 zero3 states; do
        members+=(--define "$name" "--deepspeed true --deepspeed-config $out/$name.json --overlap-grad-reduce false \
            --overlap-param-gather false")
    done
    phd 240 train_zero bench train --preset dense-1.2b --members vanilla zero1 zero3 states "${members[@]}" \
        --micro-batch-size 4 --rounds 4 --json "$out/train_zero.json"
}
fused() { # weight gradients inside the product, in Megatron-Core's own layers
    phd 120 train_fused bench train --preset dense-1.2b --members local fused --micro-batch-size 4 --rounds 5 \
        --define local "--transformer-impl local --gradient-accumulation-fusion false" \
        --define fused "--transformer-impl local --gradient-accumulation-fusion true" --json "$out/train_fused.json"
}
attention() {
    for width in 64 128; do
        for repeat in 2 3; do attend 150 "attention_d${width}_k$repeat" "$width" "$repeat" sdpa_triton flex; done
    done
}
attention_triton() { # compiling and tuning the fused kernel takes most of the time
    for width in 64 128; do
        for repeat in 2 3; do attend 200 "attention_triton_d${width}_k$repeat" "$width" "$repeat" triton; done
    done
}
attend() { # LIMIT NAME WIDTH REPEAT BACKENDS...
    phd "$1" "$2" bench attention --seq-length 4096 16384 32768 --head-dim "$3" --repeat "$4" --heads 16 --kv-heads 4 \
        --dtype bfloat16 --rounds 5 --only-phd --backends "${@:5}" --json "$out/$2.json" --csv "$out/$2.csv" \
        --plot "$out/$2.svg"
}
decode() {
    phd 200 decode bench decode --kv-length 4096 16384 32768 --batch 1 32 --repeat 2 3 4 --rounds 9 \
        --json "$out/decode.json" --csv "$out/decode.csv" --plot "$out/decode.svg"
}
norm_rope() {
    phd 140 norm_rope bench norm-rope --rows 8192 65536 --head-dim 64 128 --norms "" q qk qkv --rounds 9 \
        --json "$out/norm_rope.json" --csv "$out/norm_rope.csv" --plot "$out/norm_rope.svg"
}
generate() { # the PHD paper's Figure 9, with a small model
    phd 150 generate bench generate --repeats 2 4 16 64 256 --variants cswa --prompt 2048 --steps 32 \
        --json "$out/generate.json" --plot "$out/generate.svg"
}
generate_550m() { # and with one of the paper's size
    phd 300 generate_550m bench generate --repeats 2 4 16 64 256 --variants cswa --prompt 2048 --steps 32 \
        --hidden-size 1536 --ffn-hidden-size 4096 --vocab-size 100278 --json "$out/generate_550m.json" \
        --plot "$out/generate_550m.svg"
}
paired() {
    python3 tools/stdlib_corpus.py "$out/corpus" && phd 60 prepare prepare --input "$out/corpus" \
        --output-prefix "$out/data/stdlib" --tokenizer byte --on-decode-error skip
    phd 500 paired sweep --config examples/sweeps/paired_75m_gpu.yaml --output "$out/paired" \
        --data-path "$out/data/stdlib" --parallel "$((3 * $(python3 -c 'import torch; print(torch.cuda.device_count())')))"
}
evidence() { # PHD_EVIDENCE_SECONDS for this command (540), PHD_EVIDENCE_PIECE for all of the machine's
    local command
    for command in rates run; do
        OUT="$out" PYTHONPATH="$PWD/tools:$PYTHONPATH" python3 -W ignore -m evidence "$command" || status=1
    done
}
layouts() {
    check 560 -s -n 4 tests/gpu/test_cuda_layouts.py tests/gpu/test_cuda_several.py \
        tests/gpu/test_cuda_graph_step.py::test_data_parallel_ranks
}

first=(doctor kernel_tests paged_tests experts_tests model_tests te_tests sync_tests graph_tests)
second=(train graphs experts generate decode)
third=(attention norm_rope attention_triton)
case "${1:-}" in
    first) set -- "${first[@]}" ;;
    second) set -- "${second[@]}" ;;
    third) set -- "${third[@]}" ;;
    "") set -- "${first[@]}" "${second[@]}" "${third[@]}" generate_550m paired ;;
esac
for part in "$@"; do
    [[ "$(type -t "$part")" == function ]] || { echo "error: no part $part; see the functions of $0" >&2; exit 2; }
    echo "== $part, $SECONDS s"
    "$part"
done
echo "== end, $SECONDS s"
exit $status
