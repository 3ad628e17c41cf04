r"""Published checkpoints to model directories, and back.

Examples:
    python launch/convert.py --from=huggingface --model=NextStep-1-Large --out=runs/nextstep-1 \
        --dtype=bfloat16
    python launch/convert.py --from=huggingface --model=Qwen2.5-14B --vae=FLUX.1-dev/vae \
        --out=runs/start --flow_head=b
    python launch/convert.py --from=huggingface --vae=FLUX.1-dev/vae --out=runs/flux-vae
    python launch/convert.py --to=huggingface --checkpoint=runs/nextstep-1 --out=exported

The first imports a NextStep model (1 or 1.1) with its image tokenizer, the second starts a new one
from a language model, the third takes an image tokenizer alone, the last writes any of them, or
the workdir of a training run, in the published format. Tensors pass through one parameter at a
time; --out gets its name when it is whole.
"""

import argparse
import logging
import pathlib
import sys

import jax.numpy as jnp
from absl import app
from absl.flags import argparse_flags

from nextstep_jax.interop import convert, huggingface, new_model, published_config
from nextstep_jax.interop.huggingface import ModelFiles
from nextstep_jax.interop.model_directory import read_json
from nextstep_jax.interop.tensor_writer import parse_size
from nextstep_jax.models.config import FLOW_HEADS, VAEConfig
from nextstep_jax.parallel.mesh import make_mesh
from nextstep_jax.sampling.presets import PRESETS
from nextstep_jax.training.logs import set_up_logging

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_FORMATS = ("huggingface",)


def open_any_model(args: argparse.Namespace, vae: VAEConfig) -> ModelFiles:
    """The model of the flags: a published NextStep, or a new one from a language model."""
    directory = pathlib.Path(args.model)
    tokenizer = pathlib.Path(args.tokenizer) if args.tokenizer else None
    if published_config.is_qwen(read_json(directory / "config.json")):
        new = new_model.NewModelConfig(
            flow_head=args.flow_head, new_rows=args.new_rows, seed=args.seed
        )
        return new_model.open_language_model(directory, vae, new, tokenizer=tokenizer)
    return huggingface.open_model(directory, tokenizer=tokenizer, downsampling=vae.downsampling)


def import_from_flags(args: argparse.Namespace) -> None:
    """--from=huggingface."""
    out = pathlib.Path(args.out)
    if args.model is None:
        if args.vae is None:
            raise ValueError("nothing to import: give --model, --vae or both")
        convert.import_vae(huggingface.open_vae(pathlib.Path(args.vae)), out)
        return
    directory = pathlib.Path(args.model)
    values = read_json(directory / "config.json")
    vae_dir = pathlib.Path(args.vae) if args.vae else huggingface.find_vae(directory, values)
    vae = huggingface.open_vae(vae_dir)
    model = open_any_model(args, vae.config)
    if model.tokenizer is None:
        logging.warning("%s has no tokenizer.json: the result cannot be prompted", directory)
    convert.import_model(
        model,
        vae,
        out,
        source=directory,
        dtype=_DTYPES[args.dtype] if args.dtype else None,
        mesh=make_mesh({"fsdp": -1}) if args.sharded else None,
        preset=args.preset,
        image_size=args.image_size,
    )


def parse_flags(argv: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse_flags.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--from", dest="source", choices=_FORMATS, help="import this format")
    way.add_argument("--to", dest="target", choices=_FORMATS, help="export to this format")
    add("--out", required=True, metavar="DIR", help="folder to make")
    ins = parser.add_argument_group("import")
    add = ins.add_argument
    add(
        "--model", metavar="DIR", help="published model: NextStep-1, 1.1, or a Qwen2.5 to start one"
    )
    add("--vae", metavar="DIR", help="image tokenizer; by default the model's own")
    add("--tokenizer", metavar="FILE", help="tokenizer.json; by default the model's own")
    add("--dtype", choices=_DTYPES, help="of the model's parameters; by default the files'")
    add("--preset", choices=PRESETS, help="settings to sample with; by default the generation's")
    add("--image_size", type=int, default=512, help="default side of the images in pixels")
    add("--sharded", action="store_true", help="pass parameters through all devices, sharded")
    new = parser.add_argument_group("a new model from a language model")
    add = new.add_argument
    add("--flow_head", choices=FLOW_HEADS, default="b", help="size of the flow head")
    add("--new_rows", choices=new_model.NEW_ROWS, default="mean", help="rows of added tokens")
    add("--seed", type=int, default=0, help="of everything that is drawn")
    outs = parser.add_argument_group("export")
    add = outs.add_argument
    add("--checkpoint", metavar="DIR", help="model directory, workdir or image tokenizer")
    add("--max_shard_size", default="5GB", help="largest file, such as 5GB or 200MB")
    args = parser.parse_args(argv[1:])
    foreign = ("model", "vae", "tokenizer", "dtype", "preset") if args.target else ("checkpoint",)
    given = [f"--{name}" for name in foreign if getattr(args, name) is not None]
    if given:
        way = "--to (export)" if args.target else "--from (import)"
        parser.error(f"{', '.join(given)}: not with {way}")
    return args


def main(args: argparse.Namespace) -> None:
    """Converts; bad input ends the program with one line."""
    set_up_logging()
    try:
        if args.source:
            import_from_flags(args)
        else:
            if args.checkpoint is None:
                raise ValueError("--to needs --checkpoint")
            size = parse_size(args.max_shard_size)
            convert.export_checkpoint(pathlib.Path(args.checkpoint), pathlib.Path(args.out), size)
    except (ValueError, OSError) as error:
        logging.debug("where it was raised", exc_info=True)
        sys.exit(f"error: {error}")
    print(f"written to {args.out}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
