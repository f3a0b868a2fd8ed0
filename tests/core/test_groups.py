"""The workers of `make test` keep the tests of a group together, so that they share what they compile.

pytest-xdist under pytest 9.2 did not, and said nothing.
"""

import pathlib
import subprocess
import sys

TESTS = """
import pathlib
import pytest

@pytest.mark.parametrize("name", ["a", "b", "c", "d"])
@pytest.mark.parametrize("again", range(5))
def test(name, again, request):
    worker = request.config.workerinput["workerid"]
    pathlib.Path(f"{name}-{again}.{worker}").touch()
"""


def test_a_group_has_one_worker(tmp_path):
    here = pathlib.Path(__file__).parent.parent
    (tmp_path / "test_names.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text((here / "conftest.py").read_text())
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadgroup", "-p", "no:cacheprovider"]
    subprocess.run([*command, str(tmp_path)], cwd=tmp_path, check=True, capture_output=True)
    workers = {}
    for path in tmp_path.glob("*.gw*"):
        workers.setdefault(path.name.split("-")[0], set()).add(path.suffix)
    assert len(workers) == 4 and all(len(found) == 1 for found in workers.values()), workers
    assert set.union(*workers.values()) == {".gw0", ".gw1"}
