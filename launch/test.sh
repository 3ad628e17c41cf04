#!/usr/bin/env bash
# Installs the test requirements, lints, and runs the tests.
#
#   ./launch/test.sh                       everything but the tests marked slow
#   ./launch/test.sh --run-slow            those too
#   ./launch/test.sh --parity              installs torch, transformers and diffusers for the CPU
#                                          too, and fails where a comparison with them is skipped
#   ./launch/test.sh tests/flow -k ode     any arguments of pytest
#
# NEXTSTEP_TEST_WORKERS sets the number of pytest processes (default: the cores, at most 4).
# For the environment that is used, see launch/venv.sh.
set -euo pipefail

# shellcheck source=launch/venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"
extras=test
arguments=()
for argument in "$@"; do
  case "$argument" in
    --parity) extras=test,parity; arguments+=(--require-parity) ;;
    *) arguments+=("$argument") ;;
  esac
done
ensure_venv "$extras"
ensure_tpu_compiler
cd -- "$ROOT"

say "ruff check";  "$PY" -m ruff check .
say "ruff format"; "$PY" -m ruff format --check .
say "codespell";   "$PY" -m codespell_lib .

cores="$("$PY" -c 'import os; print(os.cpu_count() or 1)')"
workers="${NEXTSTEP_TEST_WORKERS:-$((cores < 4 ? cores : 4))}"
distribution=()
if ((workers > 1)); then
  distribution=(-n "$workers" --dist worksteal)
fi
exec "$PY" -m pytest ${distribution[@]+"${distribution[@]}"} ${arguments[@]+"${arguments[@]}"}
