"""Several processes: the same training as in one, and one that loses a process goes on as if it had not."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("multihost")]


def command(*arguments):
    return [sys.executable, "-u", str(ROOT / "examples" / "multihost.py"), *map(str, arguments)]


def run(*arguments):
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax")}
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The parameters of two processes with two devices each, after 20 steps."""
    file = tmp_path_factory.mktemp("unbroken") / "params.npz"
    told = run("--processes", 2, "--devices", 2, "--steps", 20, "--out", file)
    assert "2 processes, 4 devices" in told
    spent = [int(x.replace(",", "")) for x in re.search(r"state: ([\d,]+) of ([\d,]+) bytes", told).groups()]
    assert spent[0] <= (1 / 4 + 0.02) * spent[1]
    return dict(np.load(file))


def test_two_processes_are_one(unbroken, tmp_path):
    run("--processes", 1, "--devices", 4, "--steps", 20, "--out", tmp_path / "params.npz")
    alone = np.load(tmp_path / "params.npz")
    assert set(alone) == set(unbroken) and len(unbroken) == 4
    for name, x in unbroken.items():
        np.testing.assert_allclose(x, alone[name], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_killed_process_stops_the_others_and_the_run_goes_on(unbroken, tmp_path):
    arguments = ["--processes", 2, "--devices", 2, "--steps", 20, "--checkpoint", tmp_path / "run",
                 "--checkpoint-every", 5, "--out", tmp_path / "params.npz"]  # fmt: skip
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax")}
    started = subprocess.Popen(
        command(*arguments, "--pause", 0.2), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    pids = [int(pid) for pid in started.stdout.readline().split()[1:]]
    for line in started.stdout:
        if line.startswith("step 10"):
            os.kill(pids[1], signal.SIGKILL)
            break
    _, errors = started.communicate(timeout=300)
    assert started.returncode == 1 and "multihost: process 1 was ended by SIGKILL; the others are stopped" in errors
    told = run(*arguments)
    assert int(re.search(r"goes on after step (\d+)", told)[1]) >= 5
    for name, x in np.load(tmp_path / "params.npz").items():
        np.testing.assert_array_equal(x, unbroken[name])
