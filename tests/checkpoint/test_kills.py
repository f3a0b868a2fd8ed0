"""A run that is killed again and again ends like one that never was; and no flipped bit goes unseen."""

from __future__ import annotations

import sys

import kills
import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL and the fork server")
def test_killed_two_hundred_times():
    """7 minutes on 2 cores."""
    counts = kills.main(times=200, flips=100, seed=1)
    assert counts["kills"] == 200
    assert counts["mismatches"] == counts["lost"] == counts["failed"] == 0, counts
    assert counts["resumed"] > 0, "it was never killed where it matters"
    assert counts["save_in_flight"] > 20
    assert counts["phases"].keys() >= {"starting", "in a step", "in after()"}
    assert counts["bit_flips"]["detected"] == counts["bit_flips"]["flips"] == 100, counts
