#!/usr/bin/env bash
# Trains on the workers of a TPU VM, of one host or many:
#
#     export TPU=stage1 ZONE=us-east5-a
#     launch/tpu_vm.sh create v5p-128                # 64 chips, 4x4x4
#     launch/tpu_vm.sh setup                         # the checkout, and what it needs
#     launch/tpu_vm.sh train --config=configs/pretrain_stage1.py:14b \
#         --tokenizer=/mnt/share/vae --workdir=/mnt/share/stage1
#     launch/tpu_vm.sh logs | stop | delete
#
# WORKDIR has to be seen by all workers (Filestore, or a bucket mounted with gcsfuse). `train`
# returns; the run starts itself again after a failure, MAX_RESTARTS times (default 20). `stop`
# saves and ends it.
#
#     TPU, ZONE, PROJECT            which TPU VM (PROJECT: default of gcloud)
#     REPOSITORY, REVISION          what `setup` checks out; default: origin and HEAD here
#     RUNTIME                       default v2-alpha-tpuv5 (v6e: v2-alpha-tpuv6e)
#     FOLDER                        of the checkout on a worker; default nextstep_jax
#     PYTHON                        on a worker; default .venv/bin/python
#     PROGRAM                       default launch/train.py

set -euo pipefail

usage() {
  sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
  echo "error: $1" >&2
  exit 2
}

[[ $# -gt 0 ]] || usage "what to do is missing"
action="$1"
shift
[[ -n "${TPU:-}" && -n "${ZONE:-}" ]] || usage "TPU and ZONE must be set"

where=("$TPU" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"})
folder="${FOLDER:-nextstep_jax}"
python="${PYTHON:-.venv/bin/python}"

on_workers() {
  gcloud compute tpus tpu-vm ssh "${where[@]}" --worker=all --command="$1"
}

train() {
  local arguments
  printf -v arguments ' %q' "$@"
  # jax asks the TPU who the others are. The loop is a restart of all workers: when one fails, the
  # others end by themselves within the time that NEXTSTEP_PEER_TIMEOUT says.
  on_workers "cd $folder && cat > run.sh <<'END'
export NEXTSTEP_CLUSTER=\${NEXTSTEP_CLUSTER:-auto} NEXTSTEP_PLATFORM=\${NEXTSTEP_PLATFORM:-tpu}
source launch/xla_flags.sh
export JAX_COMPILATION_CACHE_DIR=\${JAX_COMPILATION_CACHE_DIR:-\$PWD/.cache/jax}
trap 'asked=1; kill -TERM \$run 2>/dev/null' TERM
for attempt in \$(seq 0 ${MAX_RESTARTS:-20}); do
  $python ${PROGRAM:-launch/train.py}$arguments &
  run=\$!
  status=0; wait \$run || status=\$?
  # A signal interrupts the first wait.
  while kill -0 \$run 2>/dev/null; do status=0; wait \$run || status=\$?; done
  [ \$status -eq 0 ] || [ -n \"\${asked:-}\" ] && break
  echo \"status \$status; restart \$((attempt + 1))\"
  sleep \${RESTART_SECONDS:-10}
done
echo \"ended with status \$status\"
END
nohup bash run.sh > run.log 2>&1 < /dev/null & echo \$! > run.pid"
}

case "$action" in
  create)
    [[ $# -eq 1 ]] || usage "create needs the accelerator type, such as v5p-128"
    gcloud compute tpus tpu-vm create "${where[@]}" --accelerator-type="$1" \
      --version="${RUNTIME:-v2-alpha-tpuv5}"
    ;;
  setup)
    repository="${REPOSITORY:-$(git remote get-url origin)}"
    revision="${REVISION:-$(git rev-parse HEAD)}"
    on_workers "set -e; [ -d $folder ] || git clone $repository $folder; cd $folder
git fetch --quiet && git checkout --quiet $revision
[ -d .venv ] || python3 -m venv .venv
.venv/bin/pip install --quiet -e '.[tpu]'"
    ;;
  train) train "$@" ;;
  logs) on_workers "tail -n ${1:-5} $folder/run.log" ;;
  # The script hands it on; one worker would do, for all agree on the step.
  stop) on_workers "kill -TERM \$(cat $folder/run.pid)" ;;
  delete) gcloud compute tpus tpu-vm delete "${where[@]}" ;;
  *) usage "unknown action '$action'" ;;
esac
