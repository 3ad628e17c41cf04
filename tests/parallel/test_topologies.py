import importlib.util
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from nextstep_jax.models.flops import peak_flops
from nextstep_jax.parallel import topologies
from nextstep_jax.parallel.topologies import get_topology


@pytest.mark.libtpu
@pytest.mark.parametrize(
    ("name", "num_slices", "count", "kind"),
    [
        ("v5p:4x4x4", 1, 64, "TPU v5"),
        ("v5p:1x1x1", 1, 1, "TPU v5"),
        ("v6e:2x4", 1, 8, "TPU v6 lite"),
        ("v6e:16x16", 2, 512, "TPU v6 lite"),
        ("v5e:4x4", 1, 16, "TPU v5 lite"),
        # Two devices a chip.
        ("tpu7x:2x2x1", 1, 8, "TPU7x"),
    ],
)
def test_tpu_topologies(name, num_slices, count, kind):
    found = get_topology(name, num_slices)
    assert len(found.devices) == count
    assert found.device_kind == kind
    assert len({getattr(device, "slice_index", 0) for device in found.devices}) == num_slices
    assert peak_flops(found.device_kind, "bfloat16") > 1e14


@pytest.mark.libtpu
@pytest.mark.parametrize("name", ["v5p:2x2x1", "v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"])
def test_memory_is_what_the_compiler_says(name):
    found = get_topology(name)
    sharding = SingleDeviceSharding(found.devices[0])
    huge = jax.ShapeDtypeStruct((2**37,), jnp.float32, sharding=sharding)
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        jax.jit(lambda x: x + 1).lower(huge).compile()
    available = re.search(r"exceeds available HBM \(([\d.]+)G\)", str(raised.value))
    assert found.memory_bytes == int(float(available.group(1)) * 2**30)


def test_cpu_devices(devices):
    found = get_topology("cpu:4")
    assert found.devices == tuple(devices[:4])
    assert found.memory_bytes is None
    with pytest.raises(ValueError, match="has already made 8 CPU devices"):
        get_topology("cpu:16")


@pytest.mark.parametrize(
    ("name", "num_slices"),
    [("v5p-128", 1), ("v9:2x2", 1), ("v5p:", 1), ("v5p:0x2x2", 1), ("cpu:2x2", 1), ("cpu:2", 2)],
)
def test_unknown_names_list_the_forms(name, num_slices):
    with pytest.raises(ValueError, match=r"accepted are v5e:4x4 .* v5p:4x4x4 .* h100:8 .* cpu:8"):
        get_topology(name, num_slices)


@pytest.mark.libtpu
def test_shapes_that_libtpu_refuses():
    with pytest.raises(ValueError, match=r"topology='v5p:3x3'.*not divisible.*accepted are"):
        get_topology("v5p:3x3")


def test_missing_compilers_name_the_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(ValueError, match=r"needs libtpu: pip install nextstep_jax\[aot\]"):
        get_topology("v5p:4x4x4")
    with pytest.raises(ValueError, match=r"needs the CUDA compiler: pip install jax\[cuda12\]"):
        get_topology("h100:8")


def test_h100_nodes(monkeypatch):
    asked = []

    def fake(name, platform, **options):
        asked.append((platform, options["topology"]))
        return topologies.topologies.TopologyDescription(jax.devices("cpu"))

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(topologies.topologies, "get_topology_desc", fake)
    found = get_topology("h100:8")
    get_topology("h100:64")
    get_topology("h100:2")
    assert asked == [("cuda", "1x1x8"), ("cuda", "1x8x8"), ("cuda", "1x1x2")]
    assert 72e9 < found.memory_bytes < 80e9
    with pytest.raises(ValueError, match="more than a node is a multiple of 8"):
        get_topology("h100:12")


LOCKED = 'ABORTED: Internal error when accessing libtpu multi-process lockfile. Run "$ sudo rm ..."'


def test_waits_for_the_lock_of_libtpu(monkeypatch):
    """The message is libtpu's own, as `test_second_process_waits` shows."""
    tries = []

    def fake(name, platform, **options):
        tries.append(name)
        if len(tries) < 3:
            raise jax.errors.JaxRuntimeError(LOCKED)
        return topologies.topologies.TopologyDescription(jax.devices("cpu"))

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(topologies.topologies, "get_topology_desc", fake)
    monkeypatch.setattr(topologies.time, "sleep", lambda seconds: None)
    assert get_topology("v5p:4x4x4").devices == tuple(jax.devices("cpu"))
    assert len(tries) == 3
    tries.clear()
    with pytest.raises(TimeoutError, match="another process has had libtpu open for 0 s"):
        get_topology("v5p:4x4x4", patience_s=0.0)


@pytest.mark.libtpu
def test_second_process_waits(monkeypatch):
    monkeypatch.delenv("ALLOW_MULTIPLE_LIBTPU_LOAD")
    program = (
        "import sys, time; from nextstep_jax.parallel.topologies import get_topology;"
        "print(len(get_topology('v5p:2x2x1', patience_s=300).devices), flush=True);"
        "time.sleep(float(sys.argv[1]))"
    )

    def start(seconds):
        command = [sys.executable, "-c", program, str(seconds)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, **pipes)

    first = start(3)
    try:
        assert first.stdout.readline() == "4\n"
        began = time.monotonic()
        second = start(0)
        assert second.stdout.readline() == "4\n", second.stderr.read()
        assert first.wait(60) == 0
        assert time.monotonic() - began > 2
        assert second.wait(60) == 0
    finally:
        first.kill()
        first.communicate()
