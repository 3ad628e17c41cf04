"""The live libraries, imported by fixtures: where they are missing, nothing imports them."""

import pytest


@pytest.fixture(scope="session")
def torch():
    """On one thread: the models are tiny, and the cores are the test processes'."""
    import torch

    torch.set_num_threads(1)
    return torch
