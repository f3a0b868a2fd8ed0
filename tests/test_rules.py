"""Every rule under every law."""

import pytest
from laws import LAWS

from jaxsgd import RULES


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", sorted(RULES))
def test_law(name, law):
    LAWS[law](RULES[name])
