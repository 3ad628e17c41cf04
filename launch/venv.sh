# shellcheck shell=bash
# Shared by the programs beside it (source it, then call `ensure_venv EXTRAS`): makes the virtual
# environment of this checkout if there is none, installs the package into it if setup.py or
# pyproject.toml changed since the last time, and leaves the interpreter's path in $PY.
#
# Environment:
#   PYTHON            interpreter that makes the environment (default: a python3 >= 3.11 on PATH)
#   NEXTSTEP_VENV     where the environment is (default: .venv in the checkout)
#   NEXTSTEP_PYTHON   interpreter of an environment of your own: used as it is, nothing installed

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${NEXTSTEP_VENV:-$ROOT/.venv}"
[[ "$VENV" == /* ]] || VENV="$PWD/$VENV"

# The torch that [parity] starts from, ours: one that the comparisons were made with. The range in
# setup.py would bring the newest, whose first choice on Linux is gigabytes of CUDA; this exact
# version is taken as a CPU build (2.13.0+cpu) wherever one of pip's indexes has it.
PARITY_TORCH="torch==2.13.0"

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# A shim on PATH may exist and still not run, so each candidate is asked for its version.
is_usable() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local candidate
  if [[ -n "${PYTHON:-}" ]]; then
    is_usable "$PYTHON" || die "PYTHON=$PYTHON is not a Python >= 3.11"
    printf '%s\n' "$PYTHON"
    return
  fi
  for candidate in python3 python3.12 python3.13 python3.11 python; do
    if is_usable "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  die "no Python >= 3.11 on PATH; install one or set PYTHON=/path/to/python3"
}

make_venv() {
  local python
  python="$(find_python)"
  # A folder without a running interpreter is left over from an interrupted run or a moved disk.
  if [[ -e "$VENV" ]]; then
    [[ -f "$VENV/pyvenv.cfg" ]] || die "$VENV exists and is not a virtual environment"
    rm -rf -- "$VENV"
  fi
  say "Making $VENV with $("$python" --version)"
  "$python" -m venv "$VENV" \
    || die "python -m venv failed; on Debian and Ubuntu: apt install python3-venv"
}

# Shows pip's current line on a terminal, nothing elsewhere, and the whole log on failure.
pip_install() {
  local log="$VENV/install.log" pid status=0
  "$PY" -m pip install --no-input "$@" >"$log" 2>&1 &
  pid=$!
  if [[ -t 2 ]]; then
    while kill -0 "$pid" 2>/dev/null; do
      printf '\r\033[K  %.72s' "$(tail -n 1 -- "$log")" >&2
      sleep 0.5
    done
    printf '\r\033[K' >&2
  fi
  wait "$pid" || status=$?
  if ((status != 0)); then
    cat -- "$log" >&2
    die "pip install failed with status $status (log: $log)"
  fi
}

has_module() {
  "$PY" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' "$1"
}

# ensure_venv [EXTRAS]: EXTRAS is a comma-separated list, or nothing for the core requirements.
ensure_venv() {
  local extras="${1:-}" want stamp size="about 1 GB"
  if [[ -n "${NEXTSTEP_PYTHON:-}" ]]; then
    is_usable "$NEXTSTEP_PYTHON" || die "NEXTSTEP_PYTHON=$NEXTSTEP_PYTHON is not a Python >= 3.11"
    PY="$("$NEXTSTEP_PYTHON" -c 'import sys; print(sys.executable)')"
    return
  fi
  PY="$VENV/bin/python"
  is_usable "$PY" || make_venv
  want="$(cd -- "$ROOT" && { pwd; cat setup.py pyproject.toml; } | cksum)"
  # Any installation holds the core requirements, so `core` looks at every stamp.
  for stamp in "$VENV/.installed-${extras:-}"*; do
    if [[ -f "$stamp" && "$(<"$stamp")" == "$want" ]]; then
      return
    fi
  done
  [[ ",$extras," != *,parity,* ]] || size="about 2 GB"
  say "Installing nextstep_jax${extras:+ with [$extras]} into $VENV (a minute or two, $size)"
  if [[ ",$extras," == *,parity,* ]] && ! has_module torch; then
    pip_install "$PARITY_TORCH"
  fi
  pip_install -e "$ROOT${extras:+[$extras]}"
  printf '%s\n' "$want" >"$VENV/.installed-${extras:-core}"
}

# TPU's compiler, in a folder of its own: in the environment every program would look for a TPU, and
# of two at a time one would abort. Tests that need it are skipped where it cannot be had.
ensure_tpu_compiler() {
  local folder="$ROOT/.cache/libtpu" want
  want="$("$PY" -c 'import importlib.metadata as m, re
names = (re.match(r"libtpu[^;]*", line) for line in m.requires("jax"))
print(next((name.group().strip() for name in names if name), ""))')"
  if [[ -z "$want" || "$(uname -sm)" != "Linux x86_64" ]]; then
    return
  fi
  if [[ ! -f "$folder/.installed" || "$(<"$folder/.installed")" != "$want" ]]; then
    say "Installing $want into $folder (a minute, 0.7 GB)"
    rm -rf -- "$folder"
    "$PY" -m pip install --no-input -q --no-deps --target "$folder" "$want" || return 0
    printf '%s\n' "$want" >"$folder/.installed"
  fi
}
