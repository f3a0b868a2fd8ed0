"""optax's own test files pass with jaxsgd's functions in place of optax's: see `optax_suite`."""

import optax_suite as suite
import pytest

import jaxsgd

UPDATED = 1461
"""Tests of optax that run an update of jaxsgd, of all its test files."""


def test_record_is_of_the_installed_optax():
    held = suite.Record.load()
    if held.optax != suite.installed():
        pytest.skip(f"recorded with optax {held.optax}, {suite.installed()} is installed: make slow runs both")
    assert held.current(), "jaxsgd has other functions of optax now: python tests/helpers/optax_suite.py --record"


def test_nothing_of_optax_is_left_out_in_silence():
    """A name that both have is replaced, or `OTHER_CALLS` says why not."""
    assert not set(suite.OTHER_CALLS) & set(suite.replacements())
    assert set(suite.OTHER_CALLS) <= set(jaxsgd.__all__)
    both = set(jaxsgd.__all__) & set(suite.their_functions())
    assert both <= set(suite.replacements()) | set(suite.OTHER_CALLS)


@pytest.mark.slow
def test_everything_with_jaxsgd():
    results, held = suite.everything()
    table = suite.report(results, held)
    print(table)
    assert not suite.judge(results, held.outcomes), table
    updated = sum(result.reach == "update" for result in results.values())
    assert updated >= UPDATED, f"only {updated} of {len(results)} tests went through jaxsgd\n{table}"
    unused = suite.unused(results)
    assert not unused, f"exempt, but no such test: {unused}"
