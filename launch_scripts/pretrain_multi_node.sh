#!/usr/bin/env bash
# Pretrain on several machines. Start the same line on each of them:
#   MASTER=host0:29500 NNODES=4 bash launch_scripts/pretrain_multi_node.sh RUN.yaml [ANY --option value]
#
#   MASTER      host:port of one of the machines, reachable from all
#   NNODES      number of machines
#   RUN_ID      a name shared by the machines of this run; default phd-megatron
#   NPROC       ranks per machine; default one per GPU, or 1 without GPUs
#   PYTHON      interpreter; default python of the active environment
#
# --save and --load must lie on a file system that all machines share.
set -euo pipefail

if (($# < 1)) || [[ "$1" == -h || "$1" == --help ]]; then
    sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit $(($# < 1 ? 2 : 0))
fi
: "${MASTER:?set MASTER=host:port of one of the machines}" "${NNODES:?set NNODES to the number of machines}"
config="$1"
shift
[[ -r "$config" ]] || { echo "error: cannot read the run configuration $config" >&2; exit 2; }

gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)"
nproc="${NPROC:-$((gpus > 0 ? gpus : 1))}"

# Why these are set: pretrain_single_node.sh.
export PYTHONSAFEPATH=1 CUDA_DEVICE_MAX_CONNECTIONS=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "$NNODES" --nproc-per-node "$nproc" \
    --rdzv-backend c10d --rdzv-endpoint "$MASTER" --rdzv-id "${RUN_ID:-phd-megatron}" \
    -m phd_megatron pretrain --config "$config" "$@"
