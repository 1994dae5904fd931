#!/usr/bin/env bash
# Install what titan_growth needs, then train or test. Needs Python 3.10 or newer and nothing else.
#
#   ./setup.sh train [run_train.sh arguments]      install with every extra, then ./run_train.sh
#   ./setup.sh test  [pytest arguments]            install with the development tools, then pytest
#   ./setup.sh in-env COMMAND [ARGUMENT ...]       the same installation as test, then any command (used by .ci/run)
#
# An active virtual or conda environment is used as it is; otherwise .venv beside this script is made and used. The
# system's Python is never installed into. Versions are those of constraints.txt. What is installed already is not looked
# at again until that file or pyproject.toml changes.
set -euo pipefail

script="${BASH_SOURCE[0]}"
while [[ -L "$script" ]]; do
    target="$(readlink "$script")"
    [[ "$target" == /* ]] || target="$(dirname "$script")/$target"
    script="$target"
done
checkout="$(cd "$(dirname "$script")" && pwd -P)"
wanted='import sys; sys.exit(sys.version_info < (3, 10))'
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Settings of pip that would install somewhere other than into the environment.
unset PIP_TARGET PIP_PREFIX PIP_ROOT PIP_REQUIRE_VIRTUALENV PYTHONHOME
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

fail() {
    echo "setup.sh: $*" >&2
    exit 2
}

# A Python "works" when it starts and is new enough: version managers leave names on PATH that only print an error.
works() {
    "$1" -c "$wanted" >/dev/null 2>&1 </dev/null
}

# All usable Pythons, best first. 3.11 leads because most binary packages exist for it.
pythons() {
    local name path
    for name in python3.11 python3 python3.12 python3.10 python3.13 python3.14; do
        for path in $(type -ap "$name" | awk '!seen[$0]++'); do
            if works "$path"; then echo "$path"; fi
        done
    done
}

make_environment() {
    local python="$1" folder="$2" pip
    # --clear also repairs what an interrupted run has left.
    "$python" -m venv --clear "$folder" >>"$work/venv.log" 2>&1 && return 0
    # Debian ships Python without ensurepip, which venv needs; virtualenv brings its own. Into a folder of our own even
    # an externally managed Python may install.
    if "$python" -m pip install --quiet --target "$work/virtualenv" virtualenv >>"$work/venv.log" 2>&1 &&
        PYTHONPATH="$work/virtualenv" "$python" -m virtualenv --clear "$folder" >>"$work/venv.log" 2>&1; then
        return 0
    fi
    # Last, an environment without pip, and into it a pip from any other pip of this machine.
    "$python" -m venv --clear --without-pip "$folder" >>"$work/venv.log" 2>&1 || return 1
    for pip in pip3 pip; do
        "$pip" --python "$folder/bin/python" install --quiet pip >>"$work/venv.log" 2>&1 && return 0
    done
    return 1
}

# Sets `environment` to the folder of the environment to use.
find_environment() {
    local found conda="" python made=""
    if [[ "${CONDA_DEFAULT_ENV:-}" != base ]]; then conda="${CONDA_PREFIX:-}"; fi
    for found in "${VIRTUAL_ENV:-}" "$conda"; do
        [[ -n "$found" && -x "$found/bin/python" ]] || continue
        works "$found/bin/python" || fail "the active environment $found has a Python older than 3.10." \
            "Deactivate it, or activate one with Python 3.10 or newer"
        environment="$found"
        return
    done
    environment="$checkout/.venv"
    # One without pip was interrupted while it was made, except that uv makes them so.
    if works "$environment/bin/python"; then
        "$environment/bin/python" -m pip --version >/dev/null 2>&1 && return
        grep -q '^uv = ' "$environment/pyvenv.cfg" 2>/dev/null && return
    elif "$environment/bin/python" -c "" >/dev/null 2>&1; then
        fail "$environment has a Python older than 3.10. Move it away; setup.sh then makes a new one"
    fi
    [[ -w "$checkout" ]] || fail "cannot make $environment: no permission to write to $checkout." \
        "Copy the checkout to a folder of yours, or activate an environment of yours first"
    if [[ -e "$environment" && ! -e "$environment/pyvenv.cfg" && ! -d "$environment/bin" &&
        -n "$(ls -A "$environment" 2>/dev/null)" ]]; then
        fail "$environment exists and is not a virtual environment. Move it away"
    fi
    [[ -n "$(pythons)" ]] || fail "no Python 3.10 or newer on PATH. Install one (for example python3.11) and try again"
    echo "setup.sh: making the virtual environment $environment" >&2
    while read -r python; do
        if make_environment "$python" "$environment" </dev/null; then
            made=yes
            break
        fi
    done < <(pythons)
    if [[ -z "$made" ]]; then
        fail "no virtual environment could be made at $environment ($(tail -n 1 "$work/venv.log"))." \
            "Install the venv module (on Debian or Ubuntu: apt-get install python3-venv) and try again"
    fi
}

give_pip() {
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >"$work/pip.log" 2>&1 ||
        fail "$environment has no pip. Install pip into it, or deactivate it to let setup.sh make its own environment"
    # Older ones cannot install a folder with only a pyproject.toml in place.
    "$python" -c 'import pip, sys; sys.exit(int(pip.__version__.split(".")[0]) < 22)' ||
        "$python" -m pip install --quiet --upgrade pip >"$work/pip.log" 2>&1 || { tail -n 5 "$work/pip.log" >&2
            fail "pip in $environment is too old and could not be updated (see above)"; }
}

# Which pyproject.toml, constraints.txt, checkout and extra (`$1`) an installation is of.
key_of() {
    { cat "$checkout/pyproject.toml" "$checkout/constraints.txt"; echo "$checkout $1"; } | "$python" -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

# Whether the installation with extra `$1` was finished, is of this checkout as it is, and still has the modules that
# follow. A stamp alone could lie: something may have been uninstalled since. The other folder keeps the checkout's own
# files from passing for an installation.
installed() {
    [[ "$(cat "$environment/.titan_growth_$1" 2>/dev/null)" == "$(key_of "$1")" ]] || return 1
    (cd "$work" && env -u PYTHONPATH "$python" -c \
        'import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))' "${@:2}")
}

install() {
    local extra="$1" stamp="$environment/.titan_growth_$1"
    [[ -w "$checkout" ]] || fail "cannot install $checkout: no permission to write to it. Copy it to a folder of yours"
    [[ -w "$environment" ]] || fail "cannot install into $environment: no permission to write to it." \
        "Activate an environment of yours, or deactivate this one"
    give_pip
    # Without its stamp an installation that is interrupted here is done again next time.
    rm -f "$stamp"
    echo "setup.sh: installing titan_growth into $environment (minutes, the first time)" >&2
    if ! "$python" -m pip install --quiet --constraint "$checkout/constraints.txt" --editable "$checkout[$extra]" \
        >"$work/pip.log" 2>&1 </dev/null; then
        tail -n 30 "$work/pip.log" >&2
        fail "the installation failed (see above). Once that is settled, the same command goes on from here"
    fi
    key_of "$extra" >"$stamp"
}

usage() {
    sed -n '2,9s/^# \{0,1\}//p' "$script" >&2
    exit 2
}

verb="${1:-}"
case "$verb" in
    train | test | in-env) shift ;;
    *) usage ;;
esac

# One at a time: a second setup.sh waits for the first and then finds everything done. The lock is on the folder itself,
# which leaves no file behind; where there is no flock, two at once are on their own.
exec 9<"$checkout"
if command -v flock >/dev/null; then flock 9 || true; fi
find_environment
python="$environment/bin/python"
if ! installed dev torch titan_growth pytest ruff mypy; then
    if [[ "$verb" != train ]]; then
        install dev
    elif ! installed all torch titan_growth; then
        install all
    fi
fi
exec 9<&-
rm -rf "$work"

if [[ ! -d "$environment/conda-meta" ]]; then export VIRTUAL_ENV="$environment"; fi
export PATH="$environment/bin:$PATH"
case "$verb" in
    train) exec "$checkout/run_train.sh" "$@" ;;
    test)
        cd "$checkout"
        exec "$python" -m pytest "$@" ;;
    in-env)
        [[ $# -gt 0 ]] || usage
        cd "$checkout"
        exec "$@" ;;
esac
