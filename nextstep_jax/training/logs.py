"""What a program prints: its own progress, not the libraries' diary; one line for bad input."""

import logging
import re
import sys
from collections.abc import Callable

from absl import app

from nextstep_jax.parallel import distributed
from nextstep_jax.training.metrics import NonFiniteError

# How the runtime's own errors begin; jax raises some as ValueError, such as a lost connection.
_RUNTIME = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")
_TALKATIVE = ("absl", "jax", "orbax", "grain", "asyncio")


def set_up_logging() -> None:
    """INFO for the project, warnings for the libraries, one short line each."""
    # absl's app has put its own handler there already.
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)


def run_program(main: Callable[[list[str]], None]) -> None:
    """`absl.app.run`, with the logging set up and bad input as one line and exit status 1.

    Where `main` has met other processes, an error in one ends all, and all leave together.
    """

    def run(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected arguments {argv[1:]}")
        set_up_logging()
        try:
            main(argv)
        except Exception as error:
            first_line = str(error).partition("\n")[0]
            # OSError: what is not there, not a folder, not permitted, or a full disk.
            ours = isinstance(error, ValueError | OSError | NonFiniteError)
            if ours and not _RUNTIME.match(first_line):
                logging.debug("where it was raised", exc_info=True)
                distributed.fail(f"error: {error}")
                sys.exit(f"error: {error}")
            if distributed.is_active():
                logging.exception("a fault in the program, or another process has gone")
                distributed.fail(f"error: {type(error).__name__}: {first_line}")
            raise
        distributed.finish()

    app.run(run)
