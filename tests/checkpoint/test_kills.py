"""A run that is killed again and again ends like one that never was; and no flipped bit goes unseen."""

from __future__ import annotations

import sys

import kills
import pytest


def check(counts: dict) -> None:
    assert counts["mismatches"] == counts["lost"] == counts["failed"] == 0, counts
    assert counts["resumed"] > 0, "it was never killed where it matters"
    assert counts["bit_flips"]["detected"] == counts["bit_flips"]["flips"] == 100, counts


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL and the fork server")
def test_killed_six_times():
    """27 s on 2 cores, most of them the unbroken runs before, which compile."""
    counts = kills.main(times=6, flips=100, seed=0)
    assert counts["kills"] == 6
    check(counts)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL and the fork server")
def test_killed_two_hundred_times():
    """6 minutes on 2 cores."""
    counts = kills.main(times=200, flips=100, seed=1)
    assert counts["kills"] == 200
    assert counts["save_in_flight"] > 20
    assert counts["phases"].keys() >= {"starting", "in a step", "in after()"}
    check(counts)
