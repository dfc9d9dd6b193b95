# shellcheck shell=bash
# Sourced by pretrain_single_node.sh and pretrain_multi_node.sh: starts the ranks of this machine under torchrun.
#
#   phd_help SCRIPT                        print the comment at the head of a script
#   phd_nproc                              ranks of this machine: $NPROC, else one per visible GPU, else 1
#   phd_pretrain TORCHRUN_OPTIONS -- [RUN.yaml] [ANY --option value]
#
# Exit code of phd_pretrain:
#   0     the run is finished
#   75    it saved and stopped before its end (signal, exit_duration_in_mins, exit_interval): start it again
#   else  it failed; the newest complete checkpoint is good
#
# SIGTERM, SIGUSR1, SIGINT and SIGHUP go to the ranks and not to torchrun. The ranks finish their step, save and end, and
# take as
# long as that takes; torchrun would kill them 30 seconds later and end with an error.

PHD_UNFINISHED=75   # EX_TEMPFAIL of sysexits.h

phd_fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

phd_help() { sed -n -e 1d -e '/^#/!q' -e 's/^# \{0,1\}//p' "$1"; }

phd_nproc() {
    local gpus visible
    if [[ -n "${NPROC:-}" ]]; then
        [[ "$NPROC" =~ ^[1-9][0-9]*$ ]] || phd_fail "NPROC=$NPROC is no number of ranks; use 1 or more, or unset it"
        echo "$NPROC"
        return
    fi
    # nvidia-smi lists every GPU of the machine, CUDA the visible ones only.
    if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
        gpus="${#visible[@]}"
        [[ "$CUDA_VISIBLE_DEVICES" =~ ^(-1|NoDevFiles)$ ]] && gpus=0
    else
        gpus="$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)"
    fi
    echo $((gpus > 0 ? gpus : 1))
}

# The children of a process; of torchrun these are the ranks. Slim images have no pgrep, macOS has no /proc.
phd_children() {
    cat "/proc/$1/task/"*/children 2>/dev/null || pgrep -P "$1" || true
}

phd_forward() {
    local rank
    phd_interrupted=1
    for rank in $(phd_children "$phd_agent"); do
        kill -s "$1" "$rank" 2>/dev/null || true
    done
}

phd_pretrain() {
    local options=() nproc code=0
    while [[ "$1" != -- ]]; do
        options+=("$1")
        shift
    done
    shift
    if [[ -n "${1:-}" && "$1" != -* ]]; then
        [[ -r "$1" ]] || phd_fail "cannot read the run configuration $1"
        set -- --config "$@"
    fi
    nproc="$(phd_nproc)" || exit

    # Keeps the working directory off sys.path: the checkout's folder kernels/ is no package of that name.
    export PYTHONSAFEPATH=1
    # One hardware queue starts communication kernels before the compute kernels that were issued after them; without
    # it TP and SP overlap nothing up to Hopper. Set another number for Blackwell.
    export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
    # What torchrun sets too, with a warning. On the CPU the ranks then divide the cores among themselves.
    if ((nproc > 1)); then export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"; fi
    # Where a cluster signals every process of a job, torchrun must not kill ranks that are saving.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600}"
    # The first rank of this machine writes here why it stopped: torchrun has one exit code for everything but success.
    PHD_STOP_FILE="$(mktemp)"
    export PHD_STOP_FILE
    trap 'rm -f "$PHD_STOP_FILE"' EXIT

    (
        trap '' USR1   # ends a process that has no handler; ranks have one
        exec "${PYTHON:-python}" -m torch.distributed.run "${options[@]}" --nproc-per-node "$nproc" \
            -m phd_megatron pretrain "$@"
    ) &
    phd_agent=$!
    trap 'phd_forward TERM' TERM
    trap 'phd_forward USR1' USR1
    trap 'phd_forward INT' INT
    # A lost terminal. Under nohup the signal is ignored here, and a trap is not set.
    trap 'phd_forward HUP' HUP
    # A signal ends `wait` early; what counts is how torchrun ended.
    phd_interrupted=1
    while ((phd_interrupted)); do
        phd_interrupted=0 code=0
        wait "$phd_agent" || code=$?
    done

    case "$(cat "$PHD_STOP_FILE")" in
        '' | finished) exit "$code" ;;
        *) exit "$PHD_UNFINISHED" ;;
    esac
}
