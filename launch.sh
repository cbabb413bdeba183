#!/usr/bin/env bash
# Prepares the environment (the first call takes minutes, later ones nothing) and hands over:
#   ./launch.sh ARGS…       = codeparrot-ds ARGS…
#   ./launch.sh test ARGS…  = pytest ARGS… in the repository
set -euo pipefail

here="$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)"
environment="${VIRTUAL_ENV:-${CONDA_PREFIX:-$here/.venv}}"
python="$environment/bin/python"
extras=""
arguments="$([ $# -eq 0 ] || printf ' %q' "$@")"
if [ "${1:-}" = test ]; then extras="test"; fi

fail() { echo "launch.sh: $*" >&2; exit 1; }

# What the installation depends on; read without starting Python, so that a prepared environment costs nothing.
fingerprint() { { cat "$here/setup.py" "$here/constraints.txt"; readlink -f "$python"; echo "$here"; } | sha256sum; }

is_ready() {
    [ -x "$python" ] || return 1
    local current stamps=("$environment/.codeparrot-ds-test") stamp
    if [ -z "$extras" ]; then stamps+=("$environment/.codeparrot-ds"); fi
    current="$(fingerprint)"
    for stamp in "${stamps[@]}"; do
        if [ -f "$stamp" ] && [ "$(< "$stamp")" = "$current" ]; then return 0; fi
    done
    return 1
}

check_version() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "needs Python 3.10 or newer, and $1 is $("$1" --version 2>&1)"
}

create_environment() {
    command -v python3 > /dev/null || fail "needs Python 3.10 or newer, and there is no python3 on PATH"
    check_version python3
    python3 -c 'import ensurepip, venv' 2> /dev/null ||
        fail "python3 cannot make virtual environments here; install them (Debian, Ubuntu: apt install python3-venv)"
    echo "launch.sh: creating $environment" >&2
    python3 -m venv --clear "$environment"
}

# On x86-64 Linux the package index has torch with CUDA; who told pip to look elsewhere has chosen already.
offer_cpu_build() {
    [ "$(uname -m)" = x86_64 ] && [ ! -e /dev/nvidiactl ] && ! "$python" -c 'import torch' 2> /dev/null || return 0
    local settings; settings="$("$python" -m pip config list)"
    if grep -qE "[.](index-url|extra-index-url|find-links|no-index)=" <<< "$settings"; then return 0; fi
    echo "launch.sh: no NVIDIA GPU here, and pip's torch is the CUDA build: 3 GB to fetch. For the CPU build (0.2 GB)" \
        "press Ctrl-C and run: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu ./launch.sh$arguments" >&2
}

install() {
    # pip is the last thing that venv writes, with its own place in the first line: absent or elsewhere, start afresh.
    if [ "$environment" = "$here/.venv" ] && ! grep -qs "^#!$environment/bin/" "$environment/bin/pip"; then
        create_environment
    fi
    check_version "$python"
    local pip=("$python" -m pip --disable-pip-version-check) pins=(-c "$here/constraints.txt")
    "${pip[@]}" --version > /dev/null 2>&1 || fail "$environment has no pip; run $python -m ensurepip"
    echo "launch.sh: installing into $environment (a few minutes the first time)" >&2
    offer_cpu_build
    rm -f "$environment/.codeparrot-ds" "$environment/.codeparrot-ds-test"
    if [ "$environment" != "$here/.venv" ] && "$python" -c 'import torch' 2> /dev/null; then
        pins=()  # somebody's own environment with a torch that fits the machine: only add what is missing
    fi
    "${pip[@]}" install "${pins[@]}" -e "$here${extras:+[$extras]}" >&2
    fingerprint > "$environment/.codeparrot-ds${extras:+-$extras}"
}

if ! is_ready; then
    exec 9> "$here/.launch.lock"
    if command -v flock > /dev/null; then flock 9; fi  # two first calls: the second waits, then finds all done
    if ! is_ready; then install; fi
    exec 9>&-
fi

case ":$PATH:" in *":$environment/bin:"*) called="" ;; *) called="$0" ;; esac
export PATH="$environment/bin:$PATH"
if [ "$extras" = test ]; then
    cd "$here"
    exec "$python" -m pytest "${@:2}"
fi
export CODEPARROT_DS_COMMAND="$called"  # how the commands that are proposed begin, where PATH has no codeparrot-ds
exec "$environment/bin/codeparrot-ds" "$@"
