#!/usr/bin/env bash
# Everything that needs a GPU, unattended: check first, then measure. Results go to $OUT (default runs/gpu).
# It uses the python on PATH, with the product's requirements already there; nothing is installed.
#
#   bash tests/gpu/run.sh            all of it but the kernels
#   bash tests/gpu/run.sh kernels    kernels alone: their tests on CUDA, then attention, decoding, norm and RoPE timed;
#                                    or a part of it: kernel_tests, attention WIDTH REPEAT, decode, norm_rope
#   bash tests/gpu/run.sh layouts    parity of layouts over several GPUs, then training steps, without the rest
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
out=${OUT:-runs/gpu}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 CUDA_DEVICE_MAX_CONNECTIONS=1
status=0
phd() { python3 -W ignore -m phd_megatron "$@" || status=1; }
check() { timeout 420 python3 -m pytest -q -rA -W ignore -p no:cacheprovider "$@" 2>&1 | tee -a "$out/tests.txt" || status=1; }

# What is tested is the result, so nothing is tuned; the first compilation of each case takes seconds.
kernel_tests() {
    PHD_TRITON_TUNE=0 timeout 1500 python3 -m pytest -q -rf -W ignore -p no:cacheprovider -n "${PHD_TEST_WORKERS:-8}" \
        tests/gpu/test_cuda_kernels.py tests/gpu/test_cuda_triton.py 2>&1 | tee -a "$out/kernel_tests.txt" || status=1
}
attention() { # WIDTH REPEAT...; every K tunes its own tiles, which takes minutes the first time
    local name="$out/attention_d$1_k${2// /}"
    phd bench attention --seq-length 1024 4096 16384 32768 --head-dim "$1" --repeat "${@:2}" --heads 16 --kv-heads 4 \
        --dtype bfloat16 --rounds 5 --json "$name.json" --csv "$name.csv" --plot "$name.svg"
}
decode() {
    phd bench decode --kv-length 4096 16384 32768 --batch 1 32 --repeat 2 3 4 --rounds 9 \
        --json "$out/decode.json" --csv "$out/decode.csv" --plot "$out/decode.svg"
}
norm_rope() {
    phd bench norm-rope --rows 8192 65536 --head-dim 64 128 --norms "" q qk qkv --rounds 9 \
        --json "$out/norm_rope.json" --csv "$out/norm_rope.csv" --plot "$out/norm_rope.svg"
}

case "${1:-}" in
    kernel_tests | attention | decode | norm_rope)
        "$@"
        exit $status
        ;;
    kernels)
        kernel_tests
        for width in 64 128; do for repeat in 1 2 3 4; do attention $width $repeat; done; done
        decode
        norm_rope
        exit $status
        ;;
    layouts) check tests/gpu/test_cuda_layouts.py ;;
    *)
        phd doctor
        check tests/gpu --ignore tests/gpu/test_cuda_triton.py # `kernels` runs those
        for repeat in 2 3; do
            phd bench attention --seq-length 4096 --batch 4 --heads 32 --kv-heads 8 --head-dim 64 --dtype bfloat16 \
                --repeat $repeat --rounds 9 --json "$out/attention_k$repeat.json"
        done
        ;;
esac
for implementation in auto local; do
    phd bench train --size 12x768 --micro-batch-size 8 --bf16 --rounds 9 --transformer-impl $implementation \
        --json "$out/train_12x768_$implementation.json"
done
phd bench train --size 1p2b --micro-batch-size 1 --bf16 --rounds 5 --json "$out/train_1p2b.json"
exit $status
