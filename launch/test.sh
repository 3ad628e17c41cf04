#!/usr/bin/env bash
# Installs the test requirements, lints, and runs the tests.
#
#   ./launch/test.sh                       everything but the tests marked slow
#   ./launch/test.sh --run-slow            those too
#   ./launch/test.sh tests/flow -k ode     any arguments of pytest
#
# NEXTSTEP_TEST_WORKERS sets the number of pytest processes (default: the cores, at most 4).
# For the environment that is used, see launch/venv.sh.
set -euo pipefail

# shellcheck source=launch/venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"
ensure_venv test
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
exec "$PY" -m pytest ${distribution[@]+"${distribution[@]}"} "$@"
