"""optax's own test files, run with jaxsgd's functions in place of optax's.

    python tests/helpers/optax_suite.py            all, and a report: per file, how many passed and through jaxsgd
    python tests/helpers/optax_suite.py --record   the same in optax as well, written to tests/data/optax_suite.json

The tests run in an interpreter of their own: the functions are replaced there in every module of optax that holds
them, before a test file is imported (some make their optimizers at import). What is replaced follows from what
jaxsgd exports, see `replacements`. A test went through jaxsgd if an ``update`` of jaxsgd ran in it.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import inspect
import json
import os
import pathlib
import pkgutil
import re
import subprocess
import sys
import tempfile
import types
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data" / "optax_suite.json"

HOMES = ("optax", "optax.contrib", "optax.transforms")
"""Where optax's public functions are."""

OTHER_NAMES = {"muon": "optax_muon"}
"""optax's name -> jaxsgd's, where they differ."""

OTHER_CALLS: dict[str, str] = {}
"""Names that both have for different things: not replaced."""

DEPRECATED = {"optimistic_adam": "use `optimistic_adam_v2` instead"}
"""Names that optax deprecates and jaxsgd does not: optax's tests ask for the warning, so it is given here."""


@dataclass(frozen=True)
class Exempt:
    """Tests that cannot pass.

    Attributes:
      tests: a regular expression on the label, which is the test's id with its parameters.
      error: a regular expression on the failure, so that no other failure is excused.
      reason: why, in a sentence.
      part: a regular expression on the name of the subtest that fails; the others must pass.
    """

    tests: str
    error: str
    reason: str
    part: str = ""


ALIASES = "_src/alias_test.py::AliasTest::"
UTILS = "tree_utils/_state_utils_test.py::StateUtilsTest::"
LAYOUT = "it names the fields of optax's states; jaxsgd's are count, hyper, slots and shared"
TWICE = "what inject_hyperparams injects is in jaxsgd's own state as well, so that it is found twice"
FOUND_TWICE = "Found multiple values for '(learning_rate|b1)'"

EXEMPT = (
    Exempt(
        r"test_optimizers_can_be_wrapped_in_inject_hyperparams5\(opt_name='cocob'",
        "Trees have different structures",
        "decay that the rule has not by default is stored if it is a number, and used but not stored if it is an array",
        part="Equality of new optimizer states.",
    ),
    Exempt(
        r"ScheduleFreeTest::test_explicit_dtype\d+\(params_dtype='bfloat16', state_dtype=None",
        r"dtype\(bfloat16\) != dtype\('float32'\)",
        "the z of bf16 parameters is float32",
        part="Test that attribute dtype is correct",
    ),
    Exempt(
        ALIASES + r"test_explicit_dtype\d+\(params_dtype='bfloat16', state_dtype=None",
        r"dtype\(bfloat16\) != dtype\('float32'\)",
        "the moments of bf16 parameters are float32",
        part="Test that attribute dtype is correct",
    ),
    Exempt(
        ALIASES + r"test_explicit_dtype\d+\(params_dtype='complex64', state_dtype='(float32|bfloat16)'",
        r"!= dtype\('complex64'\)",
        "the mean of complex gradients is complex in whatever dtype; optax drops the imaginary part",
        part="Test that attribute dtype is correct",
    ),
    Exempt(
        ALIASES + r"test_explicit_dtype\d+\(params_dtype=('bfloat16'|'float32'|None), state_dtype='complex64'",
        r"a slot is stored in a floating dtype|dtype\('complex64'\) != dtype\('float32'\)",
        "the mean of real gradients is real",
        part="|Test that attribute dtype is correct",
    ),
    Exempt(
        r"(combine|combining)_test.py::ExtraArgsTest::test_extra_args$",
        r"'a' is int32; parameters are floating or complex",
        "its parameters are integers, which jaxsgd refuses in words",
    ),
    Exempt(r"MuonTest::test_dim_nums_combinations_", "does not support string indexing", LAYOUT),
    Exempt(
        r"GaLoreTest::test_(3d_|dimension_numbers_right|left_|memory_|mu_dtype|projector_|rank_)",
        r"has no attribute '(projector|base_optimizer_state)'|isinstance\(state\[0\], _galore.GaLoreState\)",
        LAYOUT,
    ),
    Exempt(r"MaskedTest::test_masked_state_structure$", "Trees have different structures", LAYOUT),
    Exempt(UTILS + "test_adam$", "ScaleByAdamState.* != State", LAYOUT),
    Exempt(UTILS + "test_inject_hparams$", "has no attribute 'mu'", LAYOUT),
    Exempt(UTILS + "test_map_non_params_to_none$", "State.* != .*ScaleByAdamState", LAYOUT),
    Exempt(UTILS + "test_map_params_to_none$", "State.* != .*ScaleByRssState", LAYOUT),
    Exempt(UTILS + "test_tree_get$", FOUND_TWICE, TWICE, part="Test with unique value matching the key"),
    Exempt(UTILS + "test_tree_get$", FOUND_TWICE, TWICE, part="Test jitted tree_get"),
    Exempt(UTILS + "test_tree_get_all_with_path$", "Lists differ", TWICE, part="Test with multiple values in state"),
    Exempt(UTILS + "test_tree_set$", FOUND_TWICE, TWICE, part="Test modifying an injected hyperparam"),
    Exempt(UTILS + "test_tree_set$", FOUND_TWICE, TWICE, part="Test jitted tree_set"),
)


# -- putting jaxsgd in optax's place ------------------------------------------------------------


def their_functions() -> dict[str, Callable]:
    """optax's public functions by name."""
    public = {name: value for home in HOMES for name, value in vars(importlib.import_module(home)).items()}
    kinds = (types.FunctionType, functools.partial)
    return {name: value for name, value in public.items() if isinstance(value, kinds) and not name.startswith("_")}


def replacements() -> dict[str, tuple[Callable, Callable]]:
    """Name -> (optax's function, jaxsgd's), for every public function of optax that jaxsgd has too."""
    import jaxsgd

    ours = {name: OTHER_NAMES.get(name, name) for name in their_functions() if name not in OTHER_CALLS}
    return {
        name: (theirs, getattr(jaxsgd, ours[name]))
        for name, theirs in their_functions().items()
        if ours.get(name) in jaxsgd.__all__
    }


def optimizers() -> list[str]:
    """optax's functions that take a learning rate and make a transformation that needs no other."""
    found = {name: inspect.signature(fn).parameters for name, fn in their_functions().items()}
    return sorted(n for n, p in found.items() if "learning_rate" in p and not n.startswith("scale_by"))


@dataclass
class Tally:
    """How often jaxsgd was asked: its functions by name, ``init`` and ``update``."""

    calls: Counter = field(default_factory=Counter)

    def counted(self, name: str, fn: Callable) -> Callable:
        @functools.wraps(fn)
        def counting(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            return fn(*args, **kwargs)

        return counting

    def making(self, name: str, make: Callable) -> Callable:
        """``make`` counted, and the transformation that it returns, where no rule counts already."""
        from jaxsgd.lift import Transformation

        @functools.wraps(make)
        def made(*args: Any, **kwargs: Any) -> Any:
            tx = make(*args, **kwargs)
            if not hasattr(tx, "update") or isinstance(tx, Transformation):
                return tx
            return tx._replace(init=self.counted("init", tx.init), update=self.counted("update", tx.update))

        return self.counted(name, made)


def stand_in(name: str, theirs: Callable, ours: Callable, tally: Tally) -> Callable:
    """What takes the place of ``theirs``: ours itself if it is a rule, and ours counted if not."""
    from jaxsgd.registry import Rule

    if name in DEPRECATED:
        return _warning(ours, DEPRECATED[name])
    if isinstance(ours, Rule):
        return ours
    return tally.making(name, ours)


def _warning(make: Callable, text: str) -> Callable:
    @functools.wraps(make)
    def deprecated(*args: Any, **kwargs: Any) -> Any:
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return make(*args, **kwargs)

    return deprecated


def install() -> Tally:
    """Replace optax's functions in all its modules; gives the tally that fills from then on."""
    import optax

    from jaxsgd.lift import Lift
    from jaxsgd.registry import Rule

    for module in pkgutil.walk_packages(optax.__path__, "optax."):
        if not module.name.endswith("_test"):
            importlib.import_module(module.name)
    tally = Tally()
    pairs = replacements().items()
    replaced = {id(theirs): stand_in(name, theirs, ours, tally) for name, (theirs, ours) in pairs}
    for module in [m for name, m in sys.modules.items() if name.split(".")[0] == "optax"]:
        for name, value in list(vars(module).items()):
            if id(value) in replaced:
                setattr(module, name, replaced[id(value)])
    call = Rule.__call__

    @functools.wraps(call)
    def counting(rule: Rule, *args: Any, **kwargs: Any) -> Any:
        tally.calls[rule.name] += 1
        return call(rule, *args, **kwargs)

    Rule.__call__ = counting
    Lift.init, Lift.update = tally.counted("init", Lift.init), tally.counted("update", Lift.update)
    return tally


# -- in the interpreter of their own ------------------------------------------------------------


@dataclass
class Result:
    """What became of one test.

    Attributes:
      label: the test's id with its parameters.
      outcome: ``"passed"``, ``"skipped"`` or ``"failed"``, the worst of its subtests.
      failures: subtest, or ``""`` for the test itself -> traceback; where it was skipped, the reason under "skipped".
      calls: how often it called jaxsgd's functions, ``init`` and ``update``.
    """

    label: str
    outcome: str = "passed"
    failures: dict[str, str] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    @property
    def reach(self) -> str:
        """How far into jaxsgd it got: ``"update"``, ``"init"``, ``"call"`` or ``"none"``."""
        return next((part for part in ("update", "init") if part in self.calls), "call" if self.calls else "none")


PROGRAMS = 60
"""Tests after which compiled programs are dropped. With all of them in memory the later tests take twice as long."""


class Recorder:
    """A pytest plugin that keeps the `Result` of every test."""

    def __init__(self, tally: Tally, wanted: Collection[str] | None):
        self.tally, self.wanted = tally, wanted
        self.results: dict[str, Result] = {}

    def pytest_collection_modifyitems(self, items: list) -> None:
        if self.wanted is not None:
            items[:] = [item for item in items if name_of(item.nodeid) in self.wanted]

    def pytest_runtest_setup(self, item: Any) -> None:
        import jax

        if len(self.results) % PROGRAMS == PROGRAMS - 1:
            jax.clear_caches()
        self.results[name_of(item.nodeid)] = Result(label(item))
        self.tally.calls.clear()

    def pytest_runtest_teardown(self, item: Any) -> None:
        import jax

        self.results[name_of(item.nodeid)].calls = dict(self.tally.calls)
        jax.config.update("jax_enable_x64", False)  # some tests set it and leave it set when they fail

    def pytest_runtest_logreport(self, report: Any) -> None:
        result = self.results[name_of(report.nodeid)]
        subtest = getattr(report, "context", None)
        if report.outcome != "passed":
            where = "skipped" if report.skipped else "" if subtest is None else str(subtest.msg)
            skip = isinstance(report.longrepr, tuple)  # file, line, reason
            result.failures[where] = report.longrepr[2] if skip else report.longreprtext
        rank = ("passed", "skipped", "failed").index
        result.outcome = max(result.outcome, report.outcome, key=rank)


def name_of(nodeid: str) -> str:
    """``_src/alias_test.py::AliasTest::test_optimization0``."""
    return nodeid.split("optax/", 1)[1]


def label(item: Any) -> str:
    """The test's id with its parameters, the same in every run."""
    shown = getattr(item.cls, "_test_params_reprs", {}).get(item.name, "")
    shown = re.sub(r"<(?:function|class) '?([\w.]+)'?(?: at 0x\w+)?>", r"\1", shown)
    return name_of(item.nodeid) + re.sub(r" at 0x\w+", "", shown)


class Version(str):
    """A version that compares as one. sharding_test.py compares text, where "0.10" is below "0.7", and would skip."""

    def __lt__(self, other: str) -> bool:
        return [int(part) for part in self.split(".")[:3]] < [int(part) for part in other.split(".")[:3]]

    def __ge__(self, other: str) -> bool:
        return not self < other


def inside(job: Mapping[str, Any]) -> None:
    """Run one job, as `run` asks for it, in this interpreter."""
    import jax
    import optax
    import pytest

    gc.set_threshold(200_000, 20, 100)  # as in conftest.py
    jax.__version__ = Version(jax.__version__)
    jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    recorder = Recorder(install() if job["patched"] else Tally(), job["wanted"])
    home = pathlib.Path(optax.__file__).parent
    options = [
        "-q",
        f"-c{os.devnull}",
        f"--rootdir={home.parent}",
        "-pno:cacheprovider",
        "--assert=plain",
        "--tb=short",
    ]
    pytest.main([*options, *(str(home / file) for file in job["files"])], plugins=[recorder])
    results = {name: asdict(result) for name, result in recorder.results.items()}
    pathlib.Path(job["out"]).write_text(json.dumps(results))


# -- from outside -------------------------------------------------------------------------------


def their_files() -> list[str]:
    """optax's test files that name an optimizer: the others are of losses, schedules, projections, trees."""
    import optax

    home = pathlib.Path(optax.__file__).parent
    names = re.compile(rf"\b(alias|contrib)\b|\.({'|'.join(replacements())})\b")
    return sorted(str(path.relative_to(home)) for path in home.rglob("*_test.py") if names.search(path.read_text()))


def files_of(names: Collection[str]) -> list[str]:
    """The files that tests are in."""
    return sorted({name.split("::")[0] for name in names})


def run(*, patched: bool, files: Collection[str], wanted: Collection[str] | None = None) -> dict[str, Result]:
    """Run optax's test files in a new interpreter, with jaxsgd's functions or as they are.

    Args:
      patched: put jaxsgd's functions in place of optax's.
      files: paths in optax.
      wanted: names of the tests to run; all by default. One that cannot be run counts as failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        job, out = pathlib.Path(folder) / "job.json", pathlib.Path(folder) / "results.json"
        asked = {"patched": patched, "files": list(files), "out": str(out)}
        job.write_text(json.dumps({**asked, "wanted": None if wanted is None else list(wanted)}))
        # No plugins or options of the run around, and the eight devices that sharding_test.py sets up too late.
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        env |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        env["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
        command = [sys.executable, __file__, "--job", str(job)]
        ended = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
        if not out.exists():
            raise RuntimeError(f"the tests did not run:\n{ended.stdout[-4000:]}{ended.stderr[-4000:]}")
        results = {name: Result(**found) for name, found in json.loads(out.read_text()).items()}
    missing = {name: Result(name, "failed", {"": "E   it was not run"}) for name in wanted or () if name not in results}
    return results | missing


def installed() -> str:
    import optax

    return optax.__version__


@dataclass
class Record:
    """What is known of optax's tests.

    Attributes:
      optax: the version that it was recorded with.
      replaced: the functions that jaxsgd had.
      outcomes: test -> outcome in optax.
      reach: test -> how far into jaxsgd it got, see `Result`; "open" where it got nowhere and did not pass.
    """

    optax: str
    replaced: list[str]
    outcomes: dict[str, str]
    reach: dict[str, str]

    @classmethod
    def load(cls) -> Record:
        held = json.loads(DATA.read_text())
        groups = held["tests"].items()
        lines = {f"{group}::{name}": line.split() for group, tests in groups for name, line in tests.items()}
        outcomes, reach = ({name: line[i] for name, line in lines.items()} for i in range(2))
        return cls(held["optax"], held["replaced"], outcomes, reach)

    def save(self) -> None:
        tests: dict[str, dict[str, str]] = {}
        for name in sorted(self.outcomes):
            group, test = name.rsplit("::", 1)
            tests.setdefault(group, {})[test] = f"{self.outcomes[name]} {self.reach[name]}"
        DATA.write_text(json.dumps({"optax": self.optax, "replaced": self.replaced, "tests": tests}, indent=1) + "\n")

    def current(self) -> bool:
        """Whether it is of the installed optax and of the functions that jaxsgd has now."""
        return self.optax == installed() and self.replaced == sorted(replacements())

    def touched(self) -> list[str]:
        """The tests that have to do with jaxsgd."""
        return [name for name, reach in self.reach.items() if reach != "none"]

    def of_installed(self) -> Record:
        """This record, with the outcomes in the installed optax if it is another version."""
        if self.optax == installed():
            return self
        found = run(patched=False, files=their_files())
        return replace(self, outcomes={name: result.outcome for name, result in found.items()})


def record(files: Collection[str]) -> dict[str, Result]:
    """Run files in optax and with jaxsgd, and write what was found into `DATA`; gives the results with jaxsgd."""
    theirs, results = run(patched=False, files=files), run(patched=True, files=files)
    outcomes, reach = {}, {}
    if DATA.exists() and (held := Record.load()).optax == installed():
        known = [name for name in held.outcomes if name.split("::")[0] not in files]
        outcomes, reach = {name: held.outcomes[name] for name in known}, {name: held.reach[name] for name in known}
    for name, result in results.items():
        lost = result.reach == "none" and result.outcome != theirs[name].outcome
        outcomes[name], reach[name] = theirs[name].outcome, "open" if lost else result.reach
    Record(installed(), sorted(replacements()), outcomes, reach).save()
    return results


def judge(results: Mapping[str, Result], outcomes: Mapping[str, str]) -> dict[str, list[str]]:
    """What is wrong, test by test: failures that no exemption excuses, and exemptions that excuse none."""
    wrong = {}
    for name, result in results.items():
        if outcomes.get(name) == "failed":
            continue
        failures = {part: text for part, text in result.failures.items() if part != "skipped"}
        if result.outcome == "skipped" and outcomes.get(name) == "passed":
            failures[""] = f"E   {result.failures['skipped']} (passes in optax)"
        excuses = {part: excuse(result.label, part, text) for part, text in failures.items()}
        found = [f"{part}: {error_of(text)}".removeprefix(": ") for part, text in failures.items() if not excuses[part]]
        listed = [e for e in EXEMPT if re.search(e.tests, result.label)] if result.reach != "none" else []
        idle = [e for e in listed if e not in excuses.values()]
        found += [f"exempt without need: {e.part} {e.reason}" for e in idle]
        if found:
            wrong[name] = [result.label, *found]
    return wrong


def excuse(label: str, part: str, text: str) -> Exempt | None:
    """The exemption that a failure falls under."""
    for e in EXEMPT:
        if re.fullmatch(e.part, part) and re.search(e.tests, label) and re.search(e.error, text):
            return e
    return None


def unused(results: Mapping[str, Result]) -> list[Exempt]:
    """Exemptions of no test that ran."""
    return [e for e in EXEMPT if not any(re.search(e.tests, result.label) for result in results.values())]


def error_of(traceback: str) -> str:
    """The line that says what went wrong."""
    errors = [line[1:].strip() for line in traceback.splitlines() if line.startswith("E ")]
    return (errors or traceback.strip().splitlines())[0]


def everything() -> tuple[dict[str, Result], Record]:
    """All tests that have to do with jaxsgd, and what is known of them; all that there are if the record is old."""
    held = Record.load()
    wanted = held.touched() if held.current() else None
    files = their_files() if wanted is None else files_of(wanted)
    return run(patched=True, files=files, wanted=wanted), held.of_installed()


COLUMNS = ("run", "passed", "skipped", "fails in optax", "exempt", "wrong", "update ran", "init ran")


def verdict(result: Result, theirs: str | None, wrong: bool) -> str:
    """The column of `COLUMNS` that a test counts in."""
    if wrong or result.outcome != "failed":
        return "wrong" if wrong else result.outcome
    return "fails in optax" if theirs == "failed" else "exempt"


def report(results: Mapping[str, Result], held: Record) -> str:
    """A table of `COLUMNS` for each file, and what is wrong."""
    wrong = judge(results, held.outcomes)
    counts: dict[str, Counter] = {}
    for name, result in results.items():
        found = {"run", verdict(result, held.outcomes.get(name), name in wrong), f"{result.reach} ran"}
        for row in (name.split("::")[0], "all"):
            counts.setdefault(row, Counter()).update(found)
    rows = [*sorted(counts.keys() - {"all"}), "all"]
    lines = [f"{'':40}" + "".join(f"{column:>16}" for column in COLUMNS)]
    lines += [
        f"{row:40}" + "".join(f"{counts[row][column]:>16}" for column in COLUMNS) for row in rows if row in counts
    ]
    ours = {name: getattr(rule, "name", name) for name, (_, rule) in replacements().items()}
    called = {name for result in results.values() for name in result.calls}
    lines += ["", f"optax {installed()} (recorded: {held.optax}): {len(held.outcomes)} tests are in these files"]
    left = [name for name in optimizers() if name not in ours and name not in OTHER_CALLS]
    lines += [f"{len(ours)} functions are replaced; optimizers that are not: {', '.join(left) or 'none'}"]
    lines += [f"replaced, but in no test: {', '.join(sorted(set(ours.values()) - called)) or 'none'}"]
    return "\n".join([*lines, "", *("\n    ".join(found) for found in wrong.values())])


def main() -> int:
    parser = argparse.ArgumentParser(description="optax's own tests, run with jaxsgd's functions")
    parser.add_argument("--record", action="store_true", help="run them in optax as well, and write what is found")
    parser.add_argument("files", nargs="*", help="optax's files to record; all by default")
    parser.add_argument("--job", type=pathlib.Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        inside(json.loads(arguments.job.read_text()))
        return 0
    if arguments.record:
        results, held = record(arguments.files or their_files()), Record.load()
    else:
        results, held = everything()
    print(report(results, held))
    return 1 if judge(results, held.outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
