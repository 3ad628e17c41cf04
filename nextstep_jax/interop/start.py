"""What a stage of training begins with: the model of the stage before, or a converted one."""

import dataclasses
import logging
import pathlib
from typing import Any

import jax

from nextstep_jax.data.text_tokenizer import TextTokenizer
from nextstep_jax.interop.model_directory import (
    TOKENIZER_JSON,
    read_configs,
    read_vae,
)
from nextstep_jax.models.config import NextStepConfig, VAEConfig
from nextstep_jax.training.checkpoint import StoredParams, stored_params
from nextstep_jax.training.encoding import image_tokenizer_digest


@dataclasses.dataclass(frozen=True)
class Start:
    """A model directory that training begins with.

    Attributes:
        directory: The folder.
        stored: Its parameters; of a run the last ones, not their moving average.
        tokenizer: Its text tokenizer.
    """

    directory: pathlib.Path
    stored: StoredParams
    tokenizer: TextTokenizer

    def load(self, abstract: Any) -> Any:
        """The parameters on the shardings and in the dtypes of abstract ones, and a log line.

        Raises:
            ValueError: They have other names.
        """
        wanted, found = (jax.tree.structure(tree) for tree in (abstract, self.stored.abstract))
        if wanted != found:
            raise ValueError(
                f"init_from={self.directory}: its parameters have other names than the model's"
                " (layers that are not stacked, perhaps)"
            )
        at = "" if self.stored.step is None else f" at step {self.stored.step}"
        logging.info(
            "beginning with the parameters of %s%s; optimizer, schedule and data are new",
            self.directory,
            at,
        )
        return self.stored.load(abstract)

    def check_image_tokenizer(self, config: VAEConfig, params: Any) -> None:
        """Refuses another image tokenizer than the one the model was trained on.

        Raises:
            ValueError: It is another.
        """
        own = image_tokenizer_digest(*read_vae(self.directory))
        if own != image_tokenizer_digest(config, params):
            raise ValueError(
                f"init_from={self.directory} was trained with another image tokenizer than the one"
                " given; leave --tokenizer out to use its own"
            )


def open_start(directory: pathlib.Path, config: NextStepConfig) -> Start:
    """Opens a model directory to begin with.

    Args:
        directory: The workdir of a run, or what launch/convert.py has written.
        config: Of the model to be trained.

    Raises:
        FileNotFoundError: The folder is no model directory, or has no finished checkpoint or no
            text tokenizer.
        ValueError: Its model is another; the message lists the fields.
    """
    found = dataclasses.asdict(read_configs(directory)[0])
    differing = _differing(dataclasses.asdict(config), found)
    if differing:
        raise ValueError(f"config.model does not fit init_from={directory}: {'; '.join(differing)}")
    if (directory / "params").is_dir():
        stored = StoredParams(directory.absolute() / "params")
    else:
        stored = stored_params(directory / "checkpoints", ema=False)
    path = directory / TOKENIZER_JSON
    if not path.is_file():
        raise FileNotFoundError(
            f"init_from={directory} has no {TOKENIZER_JSON}: its ids mean nothing"
        )
    return Start(directory, stored, TextTokenizer.from_file(path))


def _differing(wanted: dict[str, Any], found: dict[str, Any], prefix: str = "") -> list[str]:
    """Fields that differ, with both values."""
    lines = []
    for name, value in wanted.items():
        if isinstance(value, dict):
            lines += _differing(value, found[name], f"{prefix}{name}.")
        elif value != found[name]:
            lines.append(f"{prefix}{name}={value!r}, there {found[name]!r}")
    return lines
