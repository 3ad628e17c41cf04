"""What every test runs on: eight fake CPU devices, float32 products, a compilation cache.

All of it goes through environment variables set before jax is imported, so that programs which a
test starts inherit it, and a value given from outside wins:

    XLA_FLAGS                      devices and threads
    JAX_PLATFORMS                  cpu, with the GPU as second platform where there is one
    JAX_COMPILATION_CACHE_DIR      where compiled programs are kept between runs
"""

import glob
import importlib.metadata
import importlib.util
import os
import pathlib
import sys

import pytest

NUM_DEVICES = 8
# What tests marked parity compare with: the extra [parity].
PARITY_LIBRARIES = ("torch", "transformers", "diffusers")
ROOT = pathlib.Path(__file__).resolve().parent.parent


def _has_gpu() -> bool:
    """Whether both a GPU and jax's plugin for it are there (without importing jax)."""
    plugin = any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))
    return plugin and bool(glob.glob("/dev/nvidia[0-9]*"))


def _prepare_environment() -> None:
    """Sets what jax and the numerical libraries read at import."""
    env = os.environ
    flags = env.get("XLA_FLAGS", "").split()
    if not any(flag.startswith("--xla_force_host_platform_device_count") for flag in flags):
        flags.append(f"--xla_force_host_platform_device_count={NUM_DEVICES}")
    if not _has_gpu() and not any("xla_backend_optimization_level" in flag for flag in flags):
        # Most of a test's time is compiling; unoptimised machine code computes the same.
        flags.append("--xla_backend_optimization_level=0")
        if importlib.metadata.version("jaxlib") < "0.12":  # later ones do not know the flag
            flags.append("--xla_cpu_use_fusion_emitters=false")
    env["XLA_FLAGS"] = " ".join(flags)
    # CPU first: `jax.devices()` are the fake ones everywhere, and a GPU test asks by name.
    env.setdefault("JAX_PLATFORMS", "cpu,cuda" if _has_gpu() else "cpu")
    env.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    env.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    env.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax-tests"))
    env.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    # A bound also switches on the file lock that makes the cache safe between processes.
    env.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2 * 2**30))
    # TPU's compiler, where launch/test.sh puts it, and no waiting for another worker's.
    libtpu = ROOT / ".cache" / "libtpu" / "libtpu" / "libtpu.so"
    if libtpu.is_file():
        env.setdefault("TPU_LIBRARY_PATH", str(libtpu))
    env.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if "PYTEST_XDIST_WORKER" in env:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            env.setdefault(name, "1")
    env.setdefault("MPLBACKEND", "Agg")
    env.setdefault("TOKENIZERS_PARALLELISM", "false")


if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could set up its devices")
_prepare_environment()

from absl import flags  # noqa: E402

# Grain reads an absl flag in its workers; outside app.run nobody has parsed it.
flags.FLAGS.mark_as_parsed()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --run-slow and --require-parity."""
    parser.addoption("--run-slow", action="store_true", help="also run tests marked slow")
    parser.addoption(
        "--require-parity",
        action="store_true",
        help="tests marked parity fail, instead of being skipped, where a library is missing",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips marked tests, with the reason, where they cannot or shall not run."""
    skip_slow = pytest.mark.skip(reason="slow: give --run-slow")
    skip_gpu = pytest.mark.skip(reason="gpu: no GPU with a jax plugin on this machine")
    has_gpu = _has_gpu()
    has_libtpu = "TPU_LIBRARY_PATH" in os.environ or importlib.util.find_spec("libtpu")
    skip_libtpu = pytest.mark.skip(reason="libtpu: launch/test.sh installs it into .cache")
    missing = [name for name in PARITY_LIBRARIES if importlib.util.find_spec(name) is None]
    reason = f"parity: not installed: {', '.join(missing)}; pip install -e .[parity]"
    skip_parity = pytest.mark.skip(reason=reason)
    for item in items:
        if "slow" in item.keywords and not config.getoption("--run-slow"):
            item.add_marker(skip_slow)
        if "gpu" in item.keywords and not has_gpu:
            item.add_marker(skip_gpu)
        if item.get_closest_marker("libtpu") and not has_libtpu:
            item.add_marker(skip_libtpu)
        # Not `item.keywords`, which holds the names of folders too.
        is_parity = item.get_closest_marker("parity") is not None
        if is_parity and missing and not config.getoption("--require-parity"):
            item.add_marker(skip_parity)


@pytest.fixture
def devices():
    """The eight CPU devices that sharding tests build their meshes on."""
    import jax

    found = jax.devices("cpu")
    assert len(found) == NUM_DEVICES, found
    return found


@pytest.fixture
def gpu():
    """The first GPU, as the default device of the test."""
    import jax

    device = jax.devices("gpu")[0]
    with jax.default_device(device):
        yield device
