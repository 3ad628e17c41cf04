import time

import jax.numpy as jnp
import numpy as np
import pytest

from nextstep_jax.evaluation import timing


def test_rounds_are_interleaved_and_the_warmup_is_not_counted():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = timing.time_interleaved(calls, repeats=3, warmup=2)
    assert order == list("ab" * 5)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_seconds_are_seconds():
    seconds = timing.time_interleaved({"nap": lambda: time.sleep(0.02)}, repeats=2)
    assert all(0.02 <= value < 1.0 for value in seconds["nap"])


def test_nothing_to_time_is_an_error():
    with pytest.raises(ValueError, match="repeats=0 must be at least 1"):
        timing.time_interleaved({}, repeats=0)


def test_median_ratio_is_taken_within_rounds():
    # The machine is ten times slower in the last round; the medians alone would give 20 / 2.
    assert timing.median_ratio([4.0, 20.0, 30.0], [2.0, 10.0, 1.0]) == 2.0


def test_compile_timed_gives_the_compiled_function():
    compiled, seconds = timing.compile_timed(lambda x: 2 * x + 1, jnp.arange(3.0))
    np.testing.assert_array_equal(compiled(jnp.arange(3.0)), [1.0, 3.0, 5.0])
    assert seconds > 0
