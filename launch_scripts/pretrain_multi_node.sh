#!/usr/bin/env bash
# Pretrain on several machines. Start the same line on each of them:
#   MASTER=host0:29500 NNODES=4 bash launch_scripts/pretrain_multi_node.sh RUN.yaml --save DIR --load DIR [ANY --option]
#
#   MASTER        host:port of one of the machines, reachable from all; there the ranks find one another
#   NNODES        number of machines; MIN:MAX goes on with fewer (docs/launching.md)
#   RUN_ID        a name shared by the machines of this run; default phd-megatron
#   NPROC         ranks per machine; default one per visible GPU, or 1 without GPUs
#   PYTHON        interpreter; default python of the active environment
#   MAX_RESTARTS  how often torchrun starts all ranks again after one died; default 0
#
# What is not set is taken from what Kubernetes operators set: PET_RDZV_ENDPOINT, PET_MASTER_ADDR, PET_NNODES,
# PET_RDZV_ID, PET_NPROC_PER_NODE, PET_MAX_RESTARTS, MASTER_ADDR, and WORLD_SIZE as the number of machines.
#
# --save and --load must lie on a file system that all machines share. SIGTERM or SIGUSR1 on one machine stops all.
# Exit code on each: 0 finished, 75 stopped before the end (start it again), else failed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_torchrun.sh"

if (($# < 1)) || [[ "$1" == -h || "$1" == --help ]]; then
    phd_help "${BASH_SOURCE[0]}"
    exit $(($# < 1 ? 2 : 0))
fi
address="${PET_MASTER_ADDR:-${MASTER_ADDR:-}}"
MASTER="${MASTER:-${PET_RDZV_ENDPOINT:-${address:+$address:${PET_MASTER_PORT:-${MASTER_PORT:-29500}}}}}"
NNODES="${NNODES:-${PET_NNODES:-${WORLD_SIZE:-}}}"
# "auto" of an operator is the rule of phd_nproc.
if [[ -z "${NPROC:-}" && "${PET_NPROC_PER_NODE:-}" =~ ^[0-9]+$ ]]; then NPROC="$PET_NPROC_PER_NODE"; fi
[[ -n "$MASTER" ]] || phd_fail "MASTER is not set; set it to host:port of one of the machines, such as host0:29500"
[[ "$MASTER" =~ :[0-9]+$ ]] || phd_fail "MASTER=$MASTER has no port; use host:port, such as ${MASTER%:*}:29500"
[[ "$NNODES" =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] ||
    phd_fail "NNODES=$NNODES is no number of machines; set it to 2, for example, or to MIN:MAX"

# The ranks get a store of their own each time they find one another. In torchrun's shared one a machine that takes the
# place of a lost one waits for an address that the others wrote before it came, and all fail a minute later.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
# c10d: a key-value store on the master that every machine joins, again after a fault, and no ranks to give by hand.
phd_pretrain --nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$MASTER" \
    --rdzv-id "${RUN_ID:-${PET_RDZV_ID:-phd-megatron}}" --max-restarts "${MAX_RESTARTS:-${PET_MAX_RESTARTS:-0}}" -- "$@"
