#!/usr/bin/env bash
# Everything that needs a GPU, unattended: check first, then measure. Results go to $OUT (default runs/gpu).
# It uses the python on PATH, with the product's requirements already there; nothing is installed.
#
#   bash tests/gpu/run.sh            all of it
#   bash tests/gpu/run.sh layouts    parity of layouts over several GPUs, then training steps, without the rest
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${OUT:-runs/gpu}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 CUDA_DEVICE_MAX_CONNECTIONS=1
status=0
phd() { python3 -W ignore -m phd_megatron "$@" || status=1; }
check() { timeout 420 python3 -m pytest -q -rA -W ignore -p no:cacheprovider "$@" 2>&1 | tee -a "$out/tests.txt" || status=1; }

if [[ "${1:-}" == layouts ]]; then
    check tests/gpu/test_cuda_layouts.py
else
    phd doctor
    check tests/gpu
    for repeat in 2 3; do
        phd bench attention --seq-length 4096 --batch 4 --heads 32 --kv-heads 8 --head-dim 64 --dtype bfloat16 \
            --repeat $repeat --rounds 9 --json "$out/attention_k$repeat.json"
    done
fi
for implementation in auto local; do
    phd bench train --size 12x768 --micro-batch-size 8 --bf16 --rounds 9 --transformer-impl $implementation \
        --json "$out/train_12x768_$implementation.json"
done
phd bench train --size 1p2b --micro-batch-size 1 --bf16 --rounds 5 --json "$out/train_1p2b.json"
exit $status
