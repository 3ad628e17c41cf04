"""Counts the parameters of a model size, part by part, without allocating any of them.

Published counts to compare with: the 14B model of NextStep-1 (arXiv 2508.10711) has
14,953,814,080 parameters, its flow head (Table 6, B) 157,228,096 of them.

Example:
    python launch/count_parameters.py --size=14b --head=b --json
"""

import argparse
import functools
import json
import math
import sys

import jax
from absl import app
from absl.flags import argparse_flags
from flax import linen as nn

from nextstep_jax.models.config import DECODERS, FLOW_HEADS, NextStepConfig, nextstep_config
from nextstep_jax.models.nextstep import NextStep, init_params


def count_parameters(config: NextStepConfig) -> dict[str, int]:
    """Parameters of a model and of its parts, from shapes alone.

    Returns:
        total, decoder (blocks and final norm), embeddings, lm_head (0 where it is tied to the
        embeddings), projectors (image tokens in, condition out) and flow_head.
    """
    init = functools.partial(init_params, NextStep(config))
    params = nn.unbox(jax.eval_shape(init, jax.random.key(0)))

    def count(*names: str) -> int:
        leaves = jax.tree.leaves([params.get(name) for name in names])
        return sum(math.prod(leaf.shape) for leaf in leaves)

    return {
        "total": count(*params),
        "decoder": count("decoder"),
        "embeddings": count("embed_tokens"),
        "lm_head": count("lm_head"),
        "projectors": count("image_in_proj", "image_out_proj"),
        "flow_head": count("flow_head"),
    }


def parse_flags(argv: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse_flags.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="14b", help=f"decoder, one of {', '.join(DECODERS)}")
    heads = ", ".join(FLOW_HEADS)
    parser.add_argument("--head", help=f"flow head, one of {heads}; default: that of the size")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(argv[1:])


def main(args: argparse.Namespace) -> None:
    """Prints the counts of the size that the flags name."""
    try:
        config = nextstep_config(args.size, args.head)
    except ValueError as error:
        sys.exit(f"count_parameters: {error}")
    counts = count_parameters(config)
    if args.json:
        print(json.dumps(counts, indent=2))
        return
    for name, count in counts.items():
        print(f"{name:<12}{count:>16,}{count / counts['total']:>9.2%}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
