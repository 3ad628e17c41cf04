"""What the comparisons with live libraries share: random weights, their way to us, errors.

A module of torch gets weights that leave nothing out (norms far from 1, biases far from 0), and
its state dict goes through the map and the reader that published checkpoints go through.
"""

import jax
import ml_dtypes
import numpy as np

from nextstep_jax.interop import streaming
from nextstep_jax.interop.tensor_views import MemoryTensors


def randomise(module, seed):
    """Draws every parameter of a torch module, rounded to bfloat16 as published weights are.

    Kernels are of order one over the root of their inputs and embeddings of order one, so that
    activations stay of order one; the scales of norms are log-normal with random signs.
    """
    import torch

    for i, (name, parameter) in enumerate(module.named_parameters()):
        values = np.random.default_rng([21, seed, i]).standard_normal(parameter.shape)
        if name.endswith("bias"):
            values = 0.5 * values
        elif values.ndim == 1:
            values = np.sign(values) * np.exp(0.7 * np.abs(values) - 0.5)
        elif not name.endswith("embed_tokens.weight"):
            values = values / np.sqrt(np.prod(values.shape[1:]))
        rounded = values.astype(ml_dtypes.bfloat16).astype(np.float32)
        parameter.data = torch.from_numpy(rounded)
    return module.eval()


def arrays_of(module):
    """The state dict of a float32 torch module as numpy arrays."""
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


def load(files, slots, abstract, dtype=None):
    """Parameters from tensors whose names and shapes are exactly those of the slots."""
    streaming.check_tensors(files, slots)
    return streaming.load_params(files, slots, abstract, dtype=dtype)


def zeros_for(slots):
    """Tensors of zeros for parts of our model that the live model does not have."""
    return MemoryTensors({slot.name: np.zeros(slot.shape, np.float32) for slot in slots})


def to_numpy(values):
    """A result of either side in float64."""
    if isinstance(values, jax.Array | np.ndarray):
        return np.asarray(values, np.float64)
    return values.detach().double().numpy()


def max_error(ours, theirs):
    """max |ours - theirs| / max |theirs|."""
    ours, theirs = to_numpy(ours), to_numpy(theirs)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def rms_error(ours, theirs):
    """The root mean square of the difference over that of `theirs`."""
    ours, theirs = to_numpy(ours), to_numpy(theirs)
    assert ours.shape == theirs.shape
    return np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2))


def check(what, ours, theirs, bound):
    """Asserts `max_error`, and prints it: `pytest tests/parity -rP` shows the figures."""
    error = max_error(ours, theirs)
    print(f"{what}: {error:.1e}, bound {bound:.0e}")
    assert error <= bound, what


def check_bfloat16(what, ours, theirs, reference, bound, ratio):
    """Both in bfloat16 against the other's float32 with the same (bfloat16) weights.

    Ours must be within `bound` of it, and no further from it than `ratio` times what the other's
    own bfloat16 is; by root mean squares, which do not hang on one element.
    """
    error, their_error = rms_error(ours, reference), rms_error(theirs, reference)
    print(
        f"{what}: ours {error:.1e}, theirs {their_error:.1e} (largest value:"
        f" {max_error(ours, reference):.1e}, {max_error(theirs, reference):.1e}),"
        f" bound {bound:.0e} and {ratio} of theirs"
    )
    # A comparison of float32 with float32 would pass without showing anything.
    assert their_error > 1e-4, what
    assert error <= bound, what
    assert error <= ratio * their_error, what
