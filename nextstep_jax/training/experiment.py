"""From an experiment's config file to the task and the loop that train it.

A config file in `configs/` returns an `ml_collections.ConfigDict`; here its plain values become
the dataclasses that own the defaults, so that a key which no dataclass has is an error.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from nextstep_jax.data.arrangement import LayoutConfig
from nextstep_jax.data.buckets import grid_of
from nextstep_jax.data.pipeline import DataConfig, layout_of
from nextstep_jax.data.records import RecordSource, check_records
from nextstep_jax.data.source_types import DRAWN_SOURCES, build_source
from nextstep_jax.data.sources import DocumentSource
from nextstep_jax.data.text_tokenizer import TextTokenizer, train_bpe
from nextstep_jax.data.tolerance import good_documents
from nextstep_jax.models.config import (
    DECODERS,
    FLOW_HEADS,
    NextStepConfig,
    VAEConfig,
    nextstep_config,
)
from nextstep_jax.models.nextstep import NextStep
from nextstep_jax.models.vae import VAE
from nextstep_jax.training.encoding import image_tokenizer_digest
from nextstep_jax.training.loop import LoopConfig
from nextstep_jax.training.optimizer import OptimizerConfig
from nextstep_jax.training.pretrain import LossConfig, NextStepObjective, NextStepTask
from nextstep_jax.training.tokenizer import PerceptualNetwork, TokenizerConfig, TokenizerTask

# A ConfigDict is read like a mapping but is none.
Config = Mapping[str, Any] | ConfigDict

MODEL_SECTIONS = {
    *("image_size", "model", "sources", "data", "layout", "loss", "optimizer", "loop"),
    *("sampling", "score", "dtype", "attention", "remat", "init_from"),
}

TOKENIZER_SECTIONS = {
    *("vae", "tokenizer", "sources", "optimizer", "loop"),
    *("init_from", "dtype", "remat"),
}

WORKSTATION = {
    "size": "tiny",
    "decoder": {
        "embed_dim": 768,
        "num_layers": 12,
        "num_heads": 12,
        "num_kv_heads": 4,
        "head_dim": 64,
        "mlp_dim": 2048,
        "vocab_size": 8192,
    },
    "flow_head": {"width": 1024, "num_layers": 6},
}
"""The model of configs for data of one's own: about 110M parameters, for one GPU."""

# Documents of each source that the text tokenizer of a small model is trained on.
_NUM_TOKENIZER_DOCUMENTS = 4000


def build(cls: type, values: Config, section: str) -> Any:
    """`cls(**values)`, lists as tuples.

    Raises:
        ValueError: A key that the dataclass does not have; the message lists those it has.
    """
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"config.{section}: unknown keys {unknown}; known are {known}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def defaults(cls: type, **changes: Any) -> dict[str, Any]:
    """Every field of a config dataclass, so that each can be changed on the command line."""
    values = {
        field.name: field.default
        for field in dataclasses.fields(cls)
        if field.default is not dataclasses.MISSING
    }
    return {**values, **changes}


def loop_defaults(**changes: Any) -> dict[str, Any]:
    """`defaults` of the loop; `mesh` gives the sizes of all axes, -1 is what is left."""
    mesh = {"data": 1, "fsdp": -1, "context": 1, "tensor": 1}
    slices = dict.fromkeys(mesh, 1)
    return {**defaults(LoopConfig), "mesh": mesh, "across_slices": slices, **changes}


def optimizer_defaults(**changes: Any) -> dict[str, Any]:
    """`defaults` of the optimizer; its cosine ends with the run unless `num_steps` is given."""
    values = defaults(OptimizerConfig, **changes)
    return values if "num_steps" in changes else {**values, "num_steps": None}


def data_defaults(**changes: Any) -> dict[str, Any]:
    """`defaults` of the data; the layout has a section of its own."""
    return defaults(DataConfig, **changes)


def layout_defaults(**changes: Any) -> dict[str, Any]:
    """`defaults` of the layout, without what follows from the model.

    The images' size stands once, in the experiment's `image_size`, unless `image_bases` are given.
    """
    values = defaults(LayoutConfig)
    for name in ("image_bases", "pixels_per_token"):
        values.pop(name)
    return {**values, **changes}


def folder_and_size(argument: str) -> tuple[str, bool]:
    """The folder of "FOLDER" or "FOLDER,tiny", and whether the model shall be tiny.

    Raises:
        ValueError: Another size is asked for.
    """
    folder, _, size = argument.partition(",")
    if size not in ("", "tiny"):
        raise ValueError(f"config argument {argument!r} must be FOLDER or FOLDER,tiny")
    return folder, bool(size)


def check_sections(config: Config, known: set[str]) -> None:
    """Refuses sections that nobody would read.

    Raises:
        ValueError: Listing them and the known ones.
    """
    unknown = sorted(set(config) - known)
    if unknown:
        raise ValueError(f"config: unknown sections {unknown}; known are {sorted(known)}")


def build_loop(config: Config) -> LoopConfig:
    """The loop; `config.optimizer` and `config.loop`; the cosine ends with the run."""
    loop = dict(config["loop"])
    optimizer = dict(config["optimizer"])
    if optimizer.get("num_steps") is None:
        optimizer["num_steps"] = loop.get("num_steps", LoopConfig.num_steps)
    loop["optimizer"] = build(OptimizerConfig, optimizer, "optimizer")
    for name in ("mesh", "across_slices"):
        loop[name] = tuple(dict(loop.get(name, {})).items())
    return build(LoopConfig, loop, "loop")


def build_model_config(values: Config) -> NextStepConfig:
    """A named size with some fields replaced; `decoder` and `flow_head` are replaced in part.

    Raises:
        ValueError: Unknown sizes or fields.
    """
    values = dict(values)
    config = nextstep_config(values.pop("size"), values.pop("head", None))
    parts = {}
    for name, table in (("decoder", DECODERS), ("flow_head", FLOW_HEADS)):
        changes = dict(values.pop(name, {}))
        fields = dataclasses.asdict(getattr(config, name))
        parts[name] = build(type(next(iter(table.values()))), {**fields, **changes}, name)
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return build(NextStepConfig, {**fields, **values, **parts}, "model")


def build_sources(
    config: Config, image_size: int | None = None, *, held_out: bool = False
) -> dict[str, tuple[DocumentSource, float]]:
    """Name -> (source, weight) of `config.sources`; held out where a source has such a split."""
    size = config["image_size"] if image_size is None else image_size

    def split_of(values):
        return {"split": "heldout"} if held_out and values["type"] in DRAWN_SOURCES else {}

    return {
        name: (
            build_source({**values, **split_of(values)}, size),
            float(values.get("weight", 1.0)),
        )
        for name, values in config["sources"].items()
    }


def build_data(config: Config) -> DataConfig:
    """The data, from sections data and layout."""
    # One number says how large pictures are, here and in the sampler, unless there are several.
    values = {"image_bases": (config["image_size"],), **config.get("layout", {})}
    layout = build(LayoutConfig, values, "layout")
    return build(DataConfig, {**config["data"], "layout": layout}, "data")


def load_or_train_text_tokenizer(
    path: pathlib.Path, sources: Mapping[str, tuple[DocumentSource, float]], vocab_size: int
) -> TextTokenizer:
    """The run's own tokenizer if it stands in `path`, else a new one from the sources' text."""
    if pathlib.Path(path).is_file():
        return TextTokenizer.from_file(path)
    texts = (
        part.text
        for source, _ in sources.values()
        for document in good_documents(source, _NUM_TOKENIZER_DOCUMENTS)
        for part in document.parts
        if hasattr(part, "text")
    )
    # Size strings are text too.
    sizes = [f"{rows}*{columns}" for rows in range(65) for columns in (rows, 2 * rows)]
    return train_bpe([*texts, *sizes], vocab_size)


def build_tokenizer_task(
    config: Config, network: PerceptualNetwork | None = None
) -> tuple[TokenizerTask, LoopConfig]:
    """The training of an image tokenizer, from sections vae, tokenizer, sources, optimizer, loop.

    `network` is the perceptual term where `config.tokenizer.perceptual` names one.
    """
    check_sections(config, TOKENIZER_SECTIONS)
    vae_config = build(VAEConfig, config["vae"], "vae")
    vae = VAE(vae_config, dtype=_dtype(config), remat=config.get("remat", False))
    train = build(TokenizerConfig, config["tokenizer"], "tokenizer")
    sources = build_sources(config, train.image_size)
    task = TokenizerTask(vae, sources, train, plain(config), network)
    return task, build_loop(config)


def build_nextstep_task(
    config: Config, vae: VAE, vae_params: Any, tokenizer: TextTokenizer
) -> tuple[NextStepTask, LoopConfig]:
    """The training of the unified model, from sections model, data, sources, loss, ..."""
    check_sections(config, MODEL_SECTIONS)
    model, data, loss = _build_model(config), build_data(config), _build_loss(config)
    _check_vae(model.config, vae.config)
    sources = build_sources(config)
    _check_records(sources, data, model.config, vae.config, vae_params)
    args = (sources, tokenizer, data, loss, plain(config))
    return NextStepTask(model, vae, vae_params, *args), build_model_loop(config)


def build_objective(config: Config) -> tuple[NextStepObjective, LoopConfig]:
    """What `build_nextstep_task` trains, without data and tokenizers: for compiling alone."""
    check_sections(config, MODEL_SECTIONS)
    data = build_data(config)
    most = min(data.max_image_tokens or data.row_length, data.row_length)
    objective = NextStepObjective(_build_model(config), _build_loss(config), data.row_length, most)
    return objective, build_model_loop(config)


def build_model_loop(config: Config) -> LoopConfig:
    """`build_loop`, without what only an image tokenizer can be trained with."""
    loop = build_loop(config)
    if loop.optimizer.name == "muon":
        # Its matrices are convolutions: stacked layers and heads would be taken for such.
        raise ValueError("config.optimizer.name='muon' is for image tokenizers; take 'adamw'")
    return loop


def _build_model(config: Config) -> NextStep:
    return NextStep(
        build_model_config(config["model"]),
        dtype=_dtype(config),
        attention=config.get("attention", "xla"),
        remat=config.get("remat", "none"),
    )


def _build_loss(config: Config) -> LossConfig:
    return build(LossConfig, config.get("loss", {}), "loss")


def plain(config: Any) -> Any:
    """Nested mappings and tuples as dicts and lists, for JSON."""
    if isinstance(config, Mapping) or hasattr(config, "items"):
        return {key: plain(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [plain(value) for value in config]
    return config


def _dtype(config: Config) -> Any:
    name = config.get("dtype", "float32")
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"config.dtype={name!r}; choose from ['float32', 'bfloat16']")
    return jnp.dtype(name)


def _check_records(sources, data, model_config, vae_config, vae_params) -> None:
    """Refuses records of another grid, width or image tokenizer than the run's."""
    layout = layout_of(data, model_config)
    grids = [grid_of(*size, model_config.pixels_per_token) for size in layout.image_sizes]
    for name, (source, _) in sources.items():
        if isinstance(source, RecordSource):
            check_records(
                source,
                name,
                latents=data.latents,
                token_dim=model_config.token_dim,
                grids=grids,
                image_tokenizer=image_tokenizer_digest(vae_config, vae_params),
            )


def _check_vae(model: NextStepConfig, vae: VAEConfig) -> None:
    pairs = (("latent_channels", "latent_channels"), ("downsampling", "downsampling"))
    for name, other in pairs:
        if getattr(model, name) != getattr(vae, other):
            raise ValueError(
                f"model {name}={getattr(model, name)} does not match the image tokenizer's"
                f" {getattr(vae, other)}"
            )
