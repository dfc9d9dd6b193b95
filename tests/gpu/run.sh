#!/usr/bin/env bash
# Everything that needs a GPU, unattended: check first, then measure. Results go to $OUT (default runs/gpu).
# It uses the python on PATH, with the product's requirements already there; nothing is installed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${OUT:-runs/gpu}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 CUDA_DEVICE_MAX_CONNECTIONS=1
status=0
python3 -m phd_megatron doctor || status=1
timeout 420 python3 -m pytest -q -rA -W ignore -p no:cacheprovider tests/gpu tests/kernels/test_elementwise.py \
    2>&1 | tee "$out/tests.txt" || status=1
for dtype in bfloat16; do
    python3 -m phd_megatron bench attention --seq-length 4096 --heads 32 --kv-heads 8 --head-dim 64 --dtype $dtype \
        --rounds 9 --json "$out/attention_$dtype.json" || status=1
done
python3 -W ignore -m phd_megatron bench train --size 12x768 --micro-batch-size 8 --bf16 --rounds 9 \
    --json "$out/train.json" || status=1
exit $status
