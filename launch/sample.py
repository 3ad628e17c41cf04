r"""Samples pictures from a model directory.

Examples:
    python launch/sample.py --checkpoint=runs/easy --prompt="a red circle" --num_images=4
    python launch/sample.py --checkpoint=runs/full --prompts_file=prompts.txt --guidance_scale=3
    python launch/sample.py --checkpoint=runs/full --prompt="<image>recolour the star to blue" \
        --image=scene.png --image_guidance_scale=2

The folder --out gets one PNG an image, with the settings that made it as JSON under the key
"nextstep_jax" of its metadata, and grid.png with all of them and their captions. The checkpoint
is a model directory, such as the workdir of a training run. All devices share the images.
"""

import argparse
import json
import pathlib
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from absl.flags import argparse_flags
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import nextstep_jax
from nextstep_jax.data.images import decode
from nextstep_jax.evaluation.pictures import captioned_grid
from nextstep_jax.flow.guidance import SCHEDULES
from nextstep_jax.flow.solvers import SOLVERS
from nextstep_jax.sampling.pipeline import NextStepPipeline, PipelineOutput, data_parallel_mesh
from nextstep_jax.sampling.presets import PRESETS, get_preset
from nextstep_jax.training.logs import set_up_logging

METADATA_KEY = "nextstep_jax"
# Flags named like the fields of `SamplerConfig` that they set.
_SAMPLER_FLAGS = ("solver", "shift", "noise_level", "schedule", "interval", "renorm", "token_norm")
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of the command line, then those of the file: one a line, blank lines skipped.

    Raises:
        ValueError: There are none, or the file is not UTF-8.
    """
    prompts = list(args.prompt)
    if args.prompts_file:
        try:
            # Some editors begin a file with a byte order mark, which is no part of a prompt.
            lines = pathlib.Path(args.prompts_file).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"prompts file {args.prompts_file} is not UTF-8: {error}") from error
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError("no prompts; give --prompt or --prompts_file")
    return prompts


def read_image(path: str) -> np.ndarray:
    """The uint8 (height, width, 3) pixels of an image file.

    Raises:
        ValueError: It is no image; names the file.
    """
    try:
        return decode(pathlib.Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_folder(path: str) -> None:
    """Refuses a place where no folder can be made.

    Raises:
        ValueError: There is a file, or one on the way to it.
    """
    folder = pathlib.Path(path)
    nearest = next((one for one in (folder, *folder.parents) if one.exists()), None)
    if nearest is not None and not nearest.is_dir():
        raise ValueError(f"out={path}: {nearest} is a file, not a folder")


def load(args: argparse.Namespace) -> NextStepPipeline:
    """The pipeline over all devices; bfloat16 on accelerators unless the flags say otherwise.

    A preset of the flags replaces that of the directory; single flags override both.
    """
    name = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    mesh = data_parallel_mesh() if jax.device_count() > 1 else None
    pipe = NextStepPipeline.from_pretrained(args.checkpoint, dtype=_DTYPES[name], mesh=mesh)
    if args.preset is not None:
        pipe.preset = get_preset(args.preset)
    return pipe


def sample(pipe: NextStepPipeline, args: argparse.Namespace) -> PipelineOutput:
    """Samples what the flags ask for, with a progress bar over the tokens."""
    sampler = {name: getattr(args, name) for name in _SAMPLER_FLAGS}
    # Not shown at once: bad input is to end with one line and nothing else.
    with tqdm(desc="sampling", unit="token", delay=0.1) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return pipe(
            read_prompts(args),
            negative_prompt=args.negative_prompt,
            positive_prompt=args.positive_prompt,
            image=[read_image(path) for path in args.image] or None,
            height=args.height,
            width=args.width,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance_scale,
            image_guidance_scale=args.image_guidance_scale,
            num_images_per_prompt=args.num_images,
            seed=args.seed,
            shared_noise=args.shared_noise,
            callback=progress,
            batch_size=args.batch_size,
            chunk_tokens=args.chunk_tokens,
            **{name: value for name, value in sampler.items() if value is not None},
        )


def save(
    output: PipelineOutput, folder: pathlib.Path, origin: dict[str, Any], columns: int
) -> pathlib.Path:
    """Writes single images and the grid; returns the path of the grid.

    Args:
        output: What the pipeline made.
        folder: Made if it is not there.
        origin: Goes into the metadata beside the settings of each image.
        columns: Images in a row of the grid.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for i, (image, settings) in enumerate(zip(output.images, output.settings, strict=True)):
        metadata = PngInfo()
        metadata.add_itxt(METADATA_KEY, json.dumps({**settings, **origin}))
        words = re.sub(r"\W+", "-", settings["prompt"].lower()).strip("-")[:40]
        name = f"{i:04d}-{words}-seed-{settings['seed']}.png"
        image.save(folder / name, pnginfo=metadata)
    captions = [f"{one['prompt']} (seed {one['seed']})" for one in output.settings]
    grid = folder / "grid.png"
    captioned_grid(output.images, captions, columns).save(grid)
    return grid


def parse_flags(argv: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse_flags.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="model directory")
    add("--prompt", action="append", default=[], help="caption; may be given again")
    add("--prompts_file", metavar="FILE", help="captions, one a line")
    add("--num_images", type=int, default=1, help="images of every prompt")
    add("--seed", type=int, default=0, help="seed of the first image of every prompt")
    add("--shared_noise", action="store_true", help="all prompts take the noise of the first")
    add("--out", default="samples", metavar="DIR", help="folder for the pictures")
    add("--image", action="append", default=[], metavar="FILE", help="input image, for edits")
    defaults = parser.add_argument_group("settings; by default those of the model directory")
    add = defaults.add_argument
    add("--preset", choices=PRESETS, help="published settings in place of the directory's")
    add("--positive_prompt", help="appended to every prompt after one space")
    add("--negative_prompt", help="text of the unconditional branch")
    add("--height", type=int, help="pixels; with the width on one of the aspect grids")
    add("--width", type=int, help="pixels; an edit takes the aspect of its first --image")
    add("--steps", type=int, help="steps of the solver for every token")
    add("--solver", help=f"one of {', '.join(SOLVERS)}")
    add("--shift", type=float, help="shift of the solver's times")
    add("--noise_level", type=float, help="strength of the noise of flow_sde and flow_cps")
    add("--guidance_scale", type=float, help="text guidance; 1 is none")
    add("--image_guidance_scale", type=float, help="guidance towards the input image; 1 is none")
    add("--schedule", help=f"of the guidance over the tokens: one of {', '.join(SCHEDULES)}")
    share = {"type": float, "nargs": 2, "metavar": ("START", "END")}
    add("--interval", **share, help="shares of the tokens between which guidance acts")
    switch = argparse.BooleanOptionalAction
    add("--renorm", action=switch, help="never lengthen a velocity by guidance")
    add("--token_norm", action=switch, help="normalise each sampled token")
    speed = parser.add_argument_group("computation")
    add = speed.add_argument
    add("--batch_size", type=int, default=16, help="images sampled together")
    add("--chunk_tokens", type=int, default=32, help="tokens between updates of the progress bar")
    add("--dtype", choices=_DTYPES, help="default: float32 on CPU, bfloat16 elsewhere")
    return parser.parse_args(argv[1:])


def main(args: argparse.Namespace) -> None:
    """Samples and writes; bad input ends the program with one line."""
    set_up_logging()
    try:
        # Before the model: a slip in the flags shall not cost the time to load it.
        read_prompts(args)
        check_folder(args.out)
        pipe = load(args)
        output = sample(pipe, args)
        origin = {
            "checkpoint": args.checkpoint,
            "step": pipe.step,
            "dtype": jnp.dtype(pipe.model.dtype).name,
            "input_images": args.image,
            "version": nextstep_jax.__version__,
        }
        # A row a prompt, where that is neither a column nor a ribbon.
        columns = args.num_images if 2 < args.num_images <= 8 else 4
        grid = save(output, pathlib.Path(args.out), origin, columns)
    except (ValueError, OSError) as error:
        sys.exit(f"sample: {error}")
    print(f"{len(output.images)} images in {args.out}; all of them in {grid}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
