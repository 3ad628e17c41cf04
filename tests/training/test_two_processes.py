"""Two processes that meet through jax.distributed hold the rows that one would."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np

from nextstep_jax.models.vae import from_uint8
from tests.training import one_of_two

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def test_rows_of_two_processes(make_vae, tmp_path):
    vae = make_vae(num_res_blocks=2)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 32, 32, 3)).astype(np.uint8)
    leaves = jax.tree_util.tree_leaves_with_path(vae.params)
    named = {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}
    np.savez(tmp_path / "in.npz", pixels=pixels, **named)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
    }
    program = [sys.executable, str(ROOT / "tests/training/one_of_two.py"), address, "2"]
    outs = [tmp_path / f"out-{index}.npz" for index in range(2)]
    processes = [
        subprocess.Popen(
            [*program, str(index), str(tmp_path / "in.npz"), str(out)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index, out in enumerate(outs)
    ]
    outputs = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs

    whole = one_of_two.local_batch(pixels, range(4))
    expected = np.zeros((4 * one_of_two.LENGTH, 64), np.float32)
    tokens = vae.module.apply(
        {"params": vae.params}, from_uint8(whole["images"]["32x32"]), 2, method="encode_tokens"
    )
    expected[whole["image_slots"]["32x32"]] = tokens
    expected = {
        "latents": expected.reshape(4, one_of_two.LENGTH, 64),
        "ids": np.arange(7, 11)[:, None] + np.zeros((1, one_of_two.LENGTH), int),
    }
    held = {"latents": set(), "ids": set()}
    for out in outs:
        found = np.load(out)
        assert found["total"].tolist() == [2**41 + 1, 14]  # More than 32 bits hold.
        for name in set(found.files) - {"total"}:
            kind, start, device = name.split("-")
            assert len(found[name]) == 2  # Split over fsdp, whole over tensor.
            rows = slice(int(start), int(start) + 2)
            np.testing.assert_allclose(found[name], expected[kind][rows], atol=2e-5)
            held[kind].add((int(start), device))
    assert {kind: sorted(start for start, _ in places) for kind, places in held.items()} == {
        "latents": [0, 0, 2, 2],
        "ids": [0, 0, 2, 2],
    }
