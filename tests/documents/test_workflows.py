"""The workflows are valid, and call targets of the Makefile and Pythons that pyproject.toml names."""

import pathlib
import re
import tomllib

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_a_workflow_is_complete(name):
    jobs = WORKFLOWS[name]["jobs"]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert WORKFLOWS[name][True], "YAML reads the key `on` as true"
    for job in jobs.values():
        assert job["runs-on"] and job["steps"]
        needed = job.get("needs", [])
        assert ({needed} if isinstance(needed, str) else set(needed)) <= set(jobs)
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            assert set(re.findall(r"\bmake ([a-z]+)", step.get("run", ""))) <= targets


def test_every_supported_python_is_tested():
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    supported = [line.rsplit(" ", 1)[1] for line in classifiers if re.search(r"Python :: 3\.\d", line)]
    assert WORKFLOWS["test"]["jobs"]["pinned"]["strategy"]["matrix"]["python"] == supported


def test_a_release_is_checked_and_needs_no_token():
    recipe = (ROOT / "Makefile").read_text().split("\npackage:")[1].split("\n\n")[0]
    assert "twine check --strict" in recipe
    publish = WORKFLOWS["release"]["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"} and publish["needs"] == "install"
    assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text()
