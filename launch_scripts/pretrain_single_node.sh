#!/usr/bin/env bash
# Pretrain on one machine: a laptop, one GPU, or all GPUs of a node.
#   bash launch_scripts/pretrain_single_node.sh RUN.yaml --save DIR --load DIR [ANY --option value]
#
# The first start is fresh, and every later one resumes from the newest checkpoint. Without RUN.yaml options say it all.
#
#   NPROC         ranks; default one per visible GPU (CUDA_VISIBLE_DEVICES=0 for one), or 1 without GPUs
#   PYTHON        interpreter; default python of the active environment
#   MAX_RESTARTS  how often torchrun starts all ranks again after one died; default 0
#
# Ctrl-C and SIGTERM save and stop. Exit code: 0 finished, 75 stopped before the end (start it again), else failed.
# NCCL's variables and what happens in a fault: docs/launching.md.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_torchrun.sh"

if (($# < 1)) || [[ "$1" == -h || "$1" == --help ]]; then
    phd_help "${BASH_SOURCE[0]}"
    exit $(($# < 1 ? 2 : 0))
fi
# --standalone: a rendezvous on a free port of this machine, so several runs do not meet.
phd_pretrain --standalone --max-restarts "${MAX_RESTARTS:-0}" -- "$@"
