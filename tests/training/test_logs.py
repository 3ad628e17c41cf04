import errno
import sys

import pytest

from nextstep_jax.training.logs import run_program
from nextstep_jax.training.metrics import NonFiniteError


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("size=3 must be even"), "error: size=3 must be even"),
        (FileNotFoundError("x is not there"), "error: x is not there"),
        (NonFiniteError("step 3: loss"), "error: step 3: loss"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/x"),
            "error: [Errno 28] No space left on device: 'out/x'",
        ),
        (PermissionError(errno.EACCES, "Permission denied"), "error: [Errno 13] Permission denied"),
        (NotADirectoryError(errno.ENOTDIR, "no folder", "x"), "error: [Errno 20] no folder: 'x'"),
    ],
)
def test_bad_input_and_a_bad_disk_are_one_line(monkeypatch, error, line):
    def main(argv):
        raise error

    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit) as stopped:
        run_program(main)
    # Python prints a string and exits with status 1.
    assert stopped.value.code == line


def test_a_fault_of_the_program_is_not_hidden(monkeypatch):
    def main(argv):
        raise KeyError("name")

    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(KeyError):
        run_program(main)
