#!/usr/bin/env bash
# Pretrain on one machine: bash launch_scripts/pretrain_single_node.sh RUN.yaml [ANY --option value]
#
#   NPROC       ranks; default one per GPU, or 1 without GPUs
#   PYTHON      interpreter; default python of the active environment
#
# Give --save DIR --load DIR: the first start is fresh, and every later one resumes from the newest checkpoint.
set -euo pipefail

if (($# < 1)) || [[ "$1" == -h || "$1" == --help ]]; then
    sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit $(($# < 1 ? 2 : 0))
fi
config="$1"
shift
[[ -r "$config" ]] || { echo "error: cannot read the run configuration $config" >&2; exit 2; }

gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)"
nproc="${NPROC:-$((gpus > 0 ? gpus : 1))}"

# Keeps the working directory off sys.path: the checkout's folder kernels/ is no package of that name.
export PYTHONSAFEPATH=1
# One hardware queue keeps communication kernels in launch order, which TP and SP overlap on Hopper relies on.
export CUDA_DEVICE_MAX_CONNECTIONS=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node "$nproc" \
    -m phd_megatron pretrain --config "$config" "$@"
