"""References of the rules and their exceptions from the laws, by name; see `case.Case`."""

from __future__ import annotations

import cases_a
import cases_b
import cases_c
from case import Case, resolved

CASES: dict[str, Case] = {**cases_a.CASES, **cases_b.CASES, **cases_c.CASES}


def case_of(name: str) -> Case:
    """What the tests know of a rule; of one without an entry what follows from its name."""
    return resolved(name, CASES)
