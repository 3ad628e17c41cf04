#!/usr/bin/env bash
# Watch NextStep-1 learn to draw what captions say: makes .venv, installs, and runs
# launch/quickstart.py, which trains a tiny tokenizer and a tiny model, samples and scores.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: ./launch/quickstart.sh [--minutes=N] [--workdir=DIR] [--smoke]

  --minutes=N     minutes of training (default: 9); measuring, compiling, sampling and scoring
                  come on top, two to three minutes on two cores
  --workdir=DIR   where checkpoints, metrics and pictures go (default: runs/quickstart, or runs/smoke)
  --smoke         a run of about a minute that shows only that every part works
  --help          this text

Started again with the same workdir, it goes on where it stopped.
Environment: see launch/venv.sh.
TEXT
}

fail_usage() {
  printf 'error: %s\n\n' "$1" >&2
  usage >&2
  exit 2
}

arguments=()
while (($#)); do
  case "$1" in
    --help | -h) usage; exit 0 ;;
    --smoke) arguments+=("$1") ;;
    --minutes=*)
      [[ "${1#*=}" =~ ^[0-9]+([.][0-9]+)?$ ]] || fail_usage "$1: minutes is a positive number"
      arguments+=("$1")
      ;;
    --workdir=*)
      [[ -n "${1#*=}" ]] || fail_usage "--workdir= needs a folder"
      arguments+=("$1")
      ;;
    *) fail_usage "unknown option $1" ;;
  esac
  shift
done

# shellcheck source=launch/venv.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"
ensure_venv
exec "$PY" "$ROOT/launch/quickstart.py" ${arguments[@]+"${arguments[@]}"}
