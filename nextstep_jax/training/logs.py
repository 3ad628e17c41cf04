"""What a program prints: its own progress, not the libraries' diary."""

import logging

_TALKATIVE = ("absl", "jax", "orbax", "grain", "asyncio")


def set_up_logging() -> None:
    """INFO for the project, warnings for the libraries, one short line each."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger().setLevel(logging.INFO)
