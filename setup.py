"""Metadata, requirements and extras of nextstep_jax; the tools are configured in pyproject.toml.

Core requirements are the libraries that training, sampling and evaluation on one's own images
need, and are pinned by range: the lower bound is the oldest version the tests ran with, the upper
bound the next release that may change behaviour.
"""

import pathlib
import re

from setuptools import find_packages, setup

_ROOT = pathlib.Path(__file__).parent
_JAX = ">=0.10,<0.13"
_PYARROW = "pyarrow>=17,<27"


def _version() -> str:
    """Reads the version from the package without importing it."""
    source = (_ROOT / "nextstep_jax" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if found is None:
        raise ValueError('nextstep_jax/__init__.py: no line of the form __version__ = "..."')
    return found.group(1)


def _long_description() -> str:
    """Returns the README, or nothing in a checkout that has none."""
    readme = _ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


CORE = [
    f"jax{_JAX}",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.4,<0.13",
    "grain>=0.2.18,<0.3",
    "array_record>=0.8,<0.9",
    "msgpack>=1.0.8,<2",
    "tokenizers>=0.21,<0.24",
    "safetensors>=0.5,<0.9",
    "ml_collections>=1.1,<2",
    "absl-py>=2.1,<3",
    "jaxtyping>=0.3,<0.4",
    "numpy>=2.0,<3",
    "ml_dtypes>=0.5,<0.7",
    "scipy>=1.13,<2",
    "pillow>=11",
    "matplotlib>=3.9,<4",
    "tensorboardX>=2.6,<3",
    "tqdm>=4.66,<5",
]

EXTRAS = {
    # Accelerators. A plain install computes on the CPU.
    "cuda": [f"jax[cuda13]{_JAX}"],  # driver 580 or newer
    "cuda12": [f"jax[cuda12]{_JAX}"],  # driver 525 or newer
    "tpu": [f"jax[tpu]{_JAX}"],
    # Compile for a named TPU topology on a machine without one. jax's own extra is the only
    # thing that knows which libtpu belongs to the installed jaxlib.
    "aot": [f"jax[tpu]{_JAX}"],
    # Crops of the photographs that scikit-image ships, for configs/tokenizer_tiny.py.
    "photographs": ["scikit-image>=0.24,<0.27"],
    # Documents in parquet files.
    "parquet": [_PYARROW],
    "curate": ["ray[data]>=2.60,<3", _PYARROW],
    # Where `loop.wandb_project` sends the metrics besides.
    "wandb": ["wandb>=0.17,<1"],
    "hub": ["huggingface_hub>=0.30,<3"],
    "quant": ["qwix>=0.1.8,<0.2"],
    # The reference implementation, to compare against on a CPU.
    "parity": [
        "torch>=2.6,<2.15",
        "transformers>=4.50,<6",
        "diffusers>=0.32,<0.43",
    ],
    "test": [
        "pyyaml>=6,<7",
        "pytest>=9,<10",
        "pytest-xdist>=3.6,<4",
        "beartype>=0.22,<0.24",
        "scikit-image>=0.24,<0.27",
        "ray[data]>=2.60,<3",
        _PYARROW,
        "ruff>=0.17,<0.18",
        "codespell>=2.4,<3",
    ],
}
EXTRAS["dev"] = [
    *EXTRAS["test"],
    "pre-commit>=4,<5",
    "pre-commit-hooks>=5,<7",
    "pyright>=1.1.400,<2",
]

setup(
    name="nextstep_jax",
    version=_version(),
    description="NextStep-1 in JAX: autoregressive text-to-image with continuous tokens",
    long_description=_long_description(),
    long_description_content_type="text/markdown",
    author="The nextstep_jax authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["nextstep_jax", "nextstep_jax.*"]),
    package_data={"nextstep_jax": ["py.typed", "**/*.json"]},
    python_requires=">=3.11",
    install_requires=CORE,
    extras_require=EXTRAS,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
