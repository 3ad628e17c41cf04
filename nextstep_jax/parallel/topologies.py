"""Devices of machines that are not there, to compile for ahead of time.

A topology has a name, `v5p:4x4x4` or `h100:8`, and gives device objects that a mesh can be built
on and a jitted function lowered for; nothing can be run on them. TPUs need libtpu, NVIDIA GPUs
JAX's CUDA plugin; both compile on a machine with CPUs only.
"""

import dataclasses
import importlib.util
import logging
import math
import os
import re
import time
from typing import Any

import jax
from jax.errors import JaxRuntimeError
from jax.experimental import topologies

_GIB = 2**30
# What libtpu 0.0.42 itself leaves to a program: "exceeds available HBM (95.74G)" is how it refuses
# a larger one. A device of tpu7x is half a chip. Further: the slice type that libtpu is told.
_TPUS: dict[str, tuple[float, str]] = {
    "v5e": (15.75, "v5litepod-8"),
    "v5p": (95.74, "v5p-8"),
    "v6e": (31.25, "v6e-8"),
    "tpu7x": (94.75, "tpu7x-8"),
}
_TPU_SOURCE = "what libtpu leaves to a program"

# An H100 SXM as XLA's CUDA compiler wants to be told of it: the limits of compute capability 9.0,
# NVIDIA's data sheet, and versions of the libraries that jax[cuda12] installs.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
runtime_version { major: 12 minor: 8 patch: 0 }
dnn_version_info { major: 9 minor: 10 patch: 0 }
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_H100_BYTES = 84_942_979_072
# Ours: the rest is for CUDA, NCCL and what the allocator cannot use. It takes
# XLA_PYTHON_CLIENT_MEM_FRACTION=.92 at run time: JAX's default is three quarters.
_GPU_FRACTION = 0.92
_GPU_SOURCE = f"{_GPU_FRACTION:.0%} of the card, the rest for CUDA and NCCL"
_GPUS_PER_NODE = 8

FORMS = (
    "v5e:4x4 (also v6e), v5p:4x4x4 (also tpu7x), h100:8 (a multiple of 8, or fewer), cpu:8 (fake"
    " devices)"
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
        name: As asked for.
        devices: What a mesh is built on.
        device_kind: What the devices call themselves.
        memory_bytes: Memory of a device that a program may use, or None where it has no limit.
        memory_source: Where that figure is from.
    """

    name: str
    devices: tuple[Any, ...]
    device_kind: str
    memory_bytes: int | None
    memory_source: str


def get_topology(name: str, num_slices: int = 1, patience_s: float = 600.0) -> Topology:
    """The devices of a named machine.

    Args:
        name: See `FORMS`.
        num_slices: TPU slices of that shape, joined by the data-centre network.
        patience_s: How long to wait for another process that has libtpu open, in seconds.

    Raises:
        ValueError: Nothing has that name, or the compiler for it is not installed.
        TimeoutError: Another process has libtpu open all that time.
    """
    found = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name)
    kind, sizes = found.groups() if found else ("", "")
    counts = [int(size) for size in sizes.split("x")] if sizes else []
    if kind not in (*_TPUS, "h100", "cpu") or 0 in counts or num_slices < 1:
        raise ValueError(f"topology={name!r}, {num_slices} slices: accepted are {FORMS}")
    if kind in _TPUS:
        return _tpu(name, kind, counts, num_slices, patience_s)
    if num_slices > 1 or len(counts) > 1:
        raise ValueError(f"topology={name!r}, {num_slices} slices: accepted are {FORMS}")
    return _h100(name, counts[0]) if kind == "h100" else _cpu(name, counts[0])


def _tpu(name: str, kind: str, counts: list[int], num_slices: int, patience_s: float) -> Topology:
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise ValueError(f"topology={name!r} needs libtpu: pip install nextstep_jax[aot]")
    memory_gib, accelerator = _TPUS[kind]
    # Without these libtpu asks a metadata server, which only Google's machines have.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", accelerator)
    options: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
    if math.prod(counts) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    devices = _wait_for_libtpu(name, options, patience_s)
    memory = int(memory_gib * _GIB)
    return Topology(name, devices, devices[0].device_kind, memory, _TPU_SOURCE)


def _wait_for_libtpu(name: str, options: dict[str, Any], patience_s: float) -> tuple[Any, ...]:
    """The devices, once no other process of this machine has libtpu open."""
    deadline, told = time.monotonic() + patience_s, False
    while True:
        try:
            return tuple(topologies.get_topology_desc(name, "tpu", **options).devices)
        except JaxRuntimeError as error:
            # Libtpu gives up at once where its lock is taken, but may be asked again.
            if "lockfile" not in str(error):
                reason = str(error).splitlines()[0]
                raise ValueError(f"topology={name!r}: {reason}; accepted are {FORMS}") from error
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"another process has had libtpu open for {patience_s:.0f} s: wait for its end, or"
                " set ALLOW_MULTIPLE_LIBTPU_LOAD=1 where there is memory for both"
            )
        if not told:
            logging.info("waiting up to %.0f s: another process has libtpu open", patience_s)
            told = True
        time.sleep(1.0)


def _h100(name: str, count: int) -> Topology:
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise ValueError(f"topology={name!r} needs the CUDA compiler: pip install jax[cuda12]")
    if count > _GPUS_PER_NODE and count % _GPUS_PER_NODE:
        raise ValueError(f"topology={name!r}: more than a node is a multiple of {_GPUS_PER_NODE}")
    on_node = min(count, _GPUS_PER_NODE)
    shape = f"1x{count // on_node}x{on_node}"  # slices x hosts x devices
    found = topologies.get_topology_desc(name, "cuda", target_config=_H100, topology=shape)
    devices = tuple(found.devices)
    memory = int(_GPU_FRACTION * _H100_BYTES)
    return Topology(name, devices, devices[0].device_kind, memory, _GPU_SOURCE)


def _cpu(name: str, count: int) -> Topology:
    try:
        # Takes effect only before JAX has looked for devices, and raises later.
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        logging.debug("the CPU's devices are already made")
    devices = tuple(jax.devices("cpu"))
    if len(devices) < count:
        raise ValueError(f"topology={name!r}: JAX has already made {len(devices)} CPU devices")
    return Topology(name, devices[:count], devices[0].device_kind, None, "a CPU has no limit")
