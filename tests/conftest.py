"""Once for the whole suite: eight CPU devices, a cache of compiled programs, no windows."""

from __future__ import annotations

import gc
import os
import pathlib
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

from jaxsgd.planning.targets import available

# Traces are many small objects that live long: to look for cycles among them less often takes 5% off.
gc.set_threshold(200_000, 20, 100)
jax.config.update("jax_num_cpu_devices", 8)
cache = pathlib.Path(__file__).parent.parent / ".cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture
def x64():
    """float64 within one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def retraced():
    """Nothing compiled comes into a test or out of it: for tests that change what is traced."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.hookimpl(tryfirst=True)  # pytest-xdist's own hook, which reads the groups, is registered later
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a compiler that is missing; keep all laws of a rule on one worker, with its compiled programs."""
    for item in items:
        for platform in {mark.args[0] for mark in item.iter_markers("compiler")}:
            if not available(platform):
                item.add_marker(pytest.mark.skip(reason=f"no {platform} compiler: pip install 'jaxsgd[compilers]'"))
        callspec = getattr(item, "callspec", None)
        if callspec is not None and "name" in callspec.params:
            item.add_marker(pytest.mark.xdist_group(str(callspec.params["name"])))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Begin no slow test after ``SLOW_UNTIL``, in seconds since 1970: CI has an hour, on machines of any speed."""
    until = os.environ.get("SLOW_UNTIL")
    if until and time.time() > float(until) and item.get_closest_marker("slow"):
        pytest.skip("the time for slow tests is over: make slow runs it")


ROUND = 10
"""Tests after which a worker looks whether its compiled programs are too many."""
MAPS = 25_000
"""A compiled program is some memory maps. A process has 65,530 of them; at this number a worker drops its programs."""


def _crowded(tests: int) -> bool:
    """Whether the worker's compiled programs are too many, or traces of that many tests take gigabytes.

    Where the system does not count maps, 60 tests are the limit.
    """
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists():
        return tests >= 60
    return tests >= 300 or maps.read_bytes().count(b"\n") >= MAPS


def _group(item: pytest.Item | None) -> object:
    return getattr(getattr(item, "callspec", None), "params", {}).get("name")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Drop compiled programs now and then, between two rules."""
    tests = item.config.stash[COUNT] = item.config.stash.get(COUNT, 0) + 1
    if tests >= item.config.stash.get(LOOK, ROUND) and _group(item) != _group(nextitem):
        item.config.stash[LOOK] = tests + ROUND
        if not _crowded(tests):
            return
        item.config.stash[COUNT], item.config.stash[LOOK] = 0, ROUND
        forget = sys.modules.get("laws")
        if forget is not None:
            forget._family.cache_clear()
            forget._constants.cache_clear()
        jax.clear_caches()


COUNT: pytest.StashKey[int] = pytest.StashKey()
LOOK: pytest.StashKey[int] = pytest.StashKey()
