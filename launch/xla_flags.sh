# XLA's flags for training, per platform; the one place where they stand. To be sourced:
#
#     NEXTSTEP_PLATFORM=gpu source launch/xla_flags.sh       # gpu, tpu or cpu
#
# Flags that are set already stay, and win. GPU flags go through XLA_FLAGS, where jaxlib ends the
# program at a name that it does not know; TPU flags go to libtpu through LIBTPU_INIT_ARGS. Names
# move with versions: these are jaxlib 0.10's and libtpu 0.0.42's (tests/launch/test_cluster_scripts.py).
# shellcheck shell=bash

_gpu_flags=(
  # Collectives run while the next layer computes.
  --xla_gpu_enable_latency_hiding_scheduler=true
  --xla_gpu_enable_highest_priority_async_stream=true
  --xla_gpu_enable_pipelined_all_gather=true
  --xla_gpu_enable_pipelined_reduce_scatter=true
  --xla_gpu_enable_pipelined_all_reduce=true
  --xla_gpu_enable_while_loop_double_buffering=true
  # Parameters of a layer are gathered in one piece.
  --xla_gpu_all_gather_combine_threshold_bytes=134217728
  --xla_gpu_all_reduce_combine_threshold_bytes=134217728
  --xla_gpu_reduce_scatter_combine_threshold_bytes=67108864
  # Large products are faster in cuBLAS; collectives have hung inside CUDA graphs.
  --xla_gpu_enable_triton_gemm=false
  --xla_gpu_enable_command_buffer=
)
_tpu_flags=(
  # Gathers of parameters overlap with products, over several steps.
  --xla_tpu_enable_async_collective_fusion=true
  --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
  --xla_tpu_enable_async_collective_fusion_multiple_steps=true
  --xla_tpu_overlap_compute_collective_tc=true
  --xla_enable_async_all_gather=true
  # (v6e: --xla_tpu_scoped_vmem_limit_kib=98304 in LIBTPU_INIT_ARGS is worth a measurement.)
  # Sums of gradients over the data axis.
  --xla_tpu_enable_data_parallel_all_reduce_opt=true
  --xla_tpu_data_parallel_opt_different_sized_ops=true
)

case "${NEXTSTEP_PLATFORM:-}" in
  gpu) XLA_FLAGS="${_gpu_flags[*]} ${XLA_FLAGS:-}" ;;
  tpu) LIBTPU_INIT_ARGS="${_tpu_flags[*]} ${LIBTPU_INIT_ARGS:-}" ;;
  cpu) ;;
  *)
    echo "error: NEXTSTEP_PLATFORM='${NEXTSTEP_PLATFORM:-}' must be gpu, tpu or cpu" >&2
    # Whoever sources this with `set -e` ends here.
    return 2 2>/dev/null || exit 2
    ;;
esac
export XLA_FLAGS="${XLA_FLAGS:-}" LIBTPU_INIT_ARGS="${LIBTPU_INIT_ARGS:-}"
unset _gpu_flags _tpu_flags
