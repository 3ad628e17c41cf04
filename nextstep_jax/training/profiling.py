"""A profiler trace of some steps of a run, asked for by config or by a signal while it runs.

    kill -USR1 PID      # the next `loop.profile_steps` steps

A trace lies in `profile/step-NNNNNNN-process-P` of the workdir, for TensorBoard's profile page or
Perfetto. What the config asks for, process 0 traces: the processes do the same. A signal is for
the process that gets it.
"""

import contextlib
import logging
import pathlib
import signal

import jax


class Profiler(contextlib.AbstractContextManager):
    """Starts and stops traces between steps; listens to SIGUSR1 while it is entered."""

    def __init__(self, folder: pathlib.Path, first_step: int, num_steps: int):
        """Asks for a trace or for none.

        Args:
            folder: Where traces go; made with the first of them.
            first_step: The first update that is traced, counted from 1; 0 for none.
            num_steps: Updates in a trace.
        """
        self._folder, self._num_steps = pathlib.Path(folder), num_steps
        self._first = first_step if jax.process_index() == 0 else 0
        self._requested, self._until, self._previous = False, None, None

    def __enter__(self):
        """Listens."""
        with contextlib.suppress(ValueError):  # not the main thread: the caller handles signals
            self._previous = signal.signal(signal.SIGUSR1, self._request)
        return self

    def __exit__(self, *_):
        """Ends a trace that the run cuts short, and listens no more."""
        if self._until is not None:
            self._stop()
        if self._previous is not None:
            signal.signal(signal.SIGUSR1, self._previous)

    def _request(self, *_):
        self._requested = True

    def due(self, step: int) -> bool:
        """Whether a trace starts or ends in front of an update, counted from 1."""
        if self._until is not None:
            return step >= self._until
        return self._requested or step == self._first

    def turn(self, step: int) -> None:
        """Starts or ends the trace that is due; earlier updates must have finished.

        A trace that cannot be started is reported and stops nothing.
        """
        if self._until is not None:
            self._stop()
        if not (self._requested or step == self._first):
            return
        self._requested = False
        folder = self._folder / f"step-{step:07d}-process-{jax.process_index()}"
        try:
            jax.profiler.start_trace(folder)
        except RuntimeError as error:  # somebody else is tracing
            logging.warning("no trace of step %d: %s", step, error)
            return
        self._until = step + self._num_steps
        logging.info("tracing steps %d to %d into %s", step, self._until - 1, folder)

    def _stop(self):
        self._until = None
        try:
            jax.profiler.stop_trace()
        except (RuntimeError, OSError) as error:
            logging.warning("the trace is lost: %s", error)
