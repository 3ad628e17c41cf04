r"""Compares this implementation with recorded runs of the original, number by number.

Example:
    python launch/check_parity.py --golden=recordings/case-a

Loads the recording's model through the importer of published weights, recomputes every recorded
quantity in float32, prints a table of errors and ends with one line: PASS n/n, or FAIL k/n where k
of n quantities are beyond their tolerance. The exit status is 0 or 1 accordingly.
"""

import argparse
import logging
import pathlib
import sys

import jax
from absl import app
from absl.flags import argparse_flags

from nextstep_jax.evaluation.comparison import summary, table, with_tolerance
from nextstep_jax.evaluation.recorded_run import RecordedRun
from nextstep_jax.training.logs import set_up_logging


def parse_flags(argv: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse_flags.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--golden", required=True, metavar="DIR", help="model/, vae/, golden.npz, meta.json")
    add("--rtol", type=float, help="one relative tolerance in place of those of each stage")
    add(
        "--august_loss",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also the losses of August 2025, which leave the output projector out",
    )
    return parser.parse_args(argv[1:])


def main(args: argparse.Namespace) -> None:
    """Compares; the exit status says whether all is well."""
    set_up_logging()
    # Accelerators would otherwise multiply float32 in fewer bits.
    jax.config.update("jax_default_matmul_precision", "highest")
    comparisons = []
    try:
        if args.rtol is not None and not args.rtol >= 0:
            raise ValueError(f"rtol={args.rtol} must be at least 0")
        run = RecordedRun(pathlib.Path(args.golden))
        found = run.compare_all(august_loss=args.august_loss)
        comparisons.extend(with_tolerance(found, args.rtol))
    except (ValueError, OSError, KeyError) as error:
        logging.debug("where it was raised", exc_info=True)
        if comparisons:
            print(table(comparisons))
        missing = isinstance(error, KeyError)
        sys.exit(f"error: the recording lacks {error}" if missing else f"error: {error}")
    print(table(comparisons))
    left = run.uncompared(one.name for one in comparisons)
    if left:
        print("not compared: " + ", ".join(left))
    line = summary(comparisons)
    print(line)
    sys.exit(0 if line.startswith("PASS") else 1)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
