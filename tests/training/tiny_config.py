"""The tiny experiment of conftest.py as a config file for the programs in launch/."""

import copy

from ml_collections import ConfigDict

from tests.training.conftest import TINY


def get_config(mesh: str = "fsdp") -> ConfigDict:
    """Forty steps; the argument names mesh axes of size 2 each, or the only one."""
    config = copy.deepcopy(TINY)
    axes = mesh.split(",")
    sizes = {axes[0]: -1, **dict.fromkeys(axes[1:], 2)}
    config["model"]["decoder"]["num_layers"] = 1
    config["data"]["rows_per_batch"] = 4
    config["loop"] = {
        **{"num_steps": 40, "checkpoint_every": 8, "log_every": 1, "hook_every": 0},
        "mesh": {name: sizes.get(name, 1) for name in ("data", "fsdp", "context", "tensor")},
    }
    config["sampling"] = {"preset": "plain"}
    config["score"] = {"prompts": ["a red circle"]}
    return ConfigDict(config)
