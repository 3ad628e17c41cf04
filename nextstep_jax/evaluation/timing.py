"""Fair timings: compilation apart, competitors interleaved, devices waited for.

A machine's speed drifts (other work, heat), so functions that are compared run in turn, one call
each a round, in one process; the ratio of two of them is then taken within rounds.
"""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def compile_timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """Compiles a function for the shapes of its arguments, ahead of time.

    The persistent compilation cache answers here too if it is switched on.

    Returns:
        The compiled function, and the seconds that tracing and compilation took.
    """
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled, time.perf_counter() - start


def time_interleaved(
    functions: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each call, waiting for the result, in rounds of one call a function.

    Args:
        functions: What to call, by name, without arguments.
        repeats: Timed rounds.
        warmup: Rounds before the timed ones.

    Raises:
        ValueError: If there is nothing to time.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1")
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """Median over rounds of the time of `slow` over the time of `fast`."""
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))


def environment() -> dict[str, Any]:
    """Device and versions that a measured figure belongs to."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "num_devices": jax.device_count(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
    }
