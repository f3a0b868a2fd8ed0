"""Score the learning rate that a probe suggests by full trainings.

    python benchmarks/probe_learning_rates.py --tasks held-out --seeds 3
    python benchmarks/probe_learning_rates.py --tasks none --random 150 --save random.json
    python benchmarks/probe_learning_rates.py --seeds 3 --parts random.json --write docs/learning_rates.md

For each task of learning_rate_tasks.py or random_tasks.py and each seed: full trainings at 49 rates over six decades
around the rule's usual rate, a factor of 1.33 apart (kept in .cache/learning_rates), then the probe, and beside it the
suggestions of fastai and Lightning from range tests of as many steps as the probe takes. Each suggestion is trained in
full.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from learning_rate_tasks import DESIGN, HELD_OUT, TASKS, Task
from random_tasks import random_tasks

import jaxsgd
from jaxsgd.report import Column, Table
from jaxsgd.tuning.short_runs import usual_rate

CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "learning_rates"
GRID = 10.0 ** (np.arange(-20, 29) / 8)
"""Rates of the truth, as multiples of the usual one."""
ENOUGH = 0.95
SUGGESTED = ("probe", "valley", "steep", "minimum", "lightning", "usual")


class Runs(NamedTuple):
    """Full trainings: ``losses`` (rates, steps); at the end ``whole`` and ``metric`` (rates,); ``start`` before."""

    rates: np.ndarray
    losses: np.ndarray
    whole: np.ndarray
    metric: np.ndarray
    start: float

    @property
    def ends(self) -> np.ndarray:
        """The mean over the last twentieth of the steps; infinite where a loss is not finite."""
        last = max(1, self.losses.shape[1] // 20)
        finite = np.isfinite(self.losses)
        means = np.where(finite, self.losses, 0)[:, -last:].mean(1)
        return np.where(np.all(finite, axis=1), means, np.inf)

    @property
    def diverged(self) -> np.ndarray:
        """Not finite, or after all higher than at the start."""
        return ~np.isfinite(self.ends) | ~np.isfinite(self.whole) | (self.ends > self.start)


def batches_of(task: Task, seed: int) -> tuple[Any, bool]:
    """All batches along a first axis, or the one that every step has."""
    at = task.data(seed)
    batches = [at(i) for i in range(task.steps)]
    same = batches[0] is batches[1]
    return (batches[0] if same else jax.tree.map(lambda *x: np.stack(x), *batches)), same


def loop(task: Task, same: bool, rated: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """``(rates (steps,), params, key, batches) -> (params, losses)``, a loop that shares nothing with the probe's."""

    def run(rates: jax.Array, params: Any, key: jax.Array, batches: Any) -> Any:
        tx = optax.with_extra_args_support(task.rule(rates[0]))

        def step(carry: Any, x: Any) -> Any:
            params, state = carry
            i, rate, batch = x
            batch = batches if same else batch
            loss, grads = jax.value_and_grad(task.loss_fn)(params, batch, jax.random.fold_in(key, i))
            updates, state = tx.update(grads, rated(state, rate), params, value=loss)
            return (optax.apply_updates(params, updates), state), loss

        xs = (jnp.arange(task.steps), rates, None if same else batches)
        (end, _), losses = jax.lax.scan(step, (params, tx.init(params)), xs)
        return end, losses

    return run


def train(task: Task, rates: Sequence[float] | np.ndarray, seed: int) -> Runs:
    """Full trainings at these rates."""
    batches, same = batches_of(task, seed)
    run = loop(task, same, lambda state, rate: state)

    def one(rate: jax.Array, params: Any, key: jax.Array, batches: Any, whole: Any, test: Any) -> Any:
        end, losses = run(jnp.broadcast_to(rate, (task.steps,)), params, key, batches)
        return losses, task.loss_fn(end, whole, key), task.metric(end, test)

    params, key = task.init(jax.random.key(seed)), jax.random.key(seed)
    fn = jax.jit(jax.vmap(one, in_axes=(0, None, None, None, None, None)))
    found = fn(jnp.asarray(rates, jnp.float32), params, key, batches, task.whole, task.test)
    start = float(task.loss_fn(params, task.whole, key))
    return Runs(np.asarray(rates), *map(np.asarray, found), start)


def truth(task: Task, seed: int) -> Runs:
    """The trainings at all rates of `GRID`, from the cache where they are."""
    file = CACHE / f"{task.name.replace(' ', '_')}_{seed}.npz"
    if not file.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        usual = usual_rate(task.rule, task.init(jax.random.key(seed)))[0]
        np.savez(file, **train(task, usual * GRID, seed)._asdict())
    with np.load(file) as held:
        return Runs(held["rates"], held["losses"], held["whole"], held["metric"], float(held["start"]))


# What others suggest, from a training whose rate rises by a constant factor a step


def smoothed(losses: np.ndarray) -> np.ndarray:
    """The exponential average of both, with 0.98, without its bias towards zero."""
    out, average = np.empty(len(losses)), 0.0
    for i, loss in enumerate(losses):
        average = 0.98 * average + 0.02 * loss
        out[i] = average / (1 - 0.98 ** (i + 1))
    return out


def until_four_times(average: np.ndarray) -> np.ndarray:
    """Both stop where the average is more than four times its lowest so far."""
    lowest = np.minimum.accumulate(np.where(np.isfinite(average), average, np.inf))
    bad = ~(average <= 4 * lowest)
    return average[: int(bad.argmax())] if bad.any() else average


def fastai(rates: np.ndarray, losses: np.ndarray) -> dict[str, float | None]:
    """fastai's ``valley``, ``steep`` and ``minimum``: without a tenth of the steps at the start and five at the end."""
    average = until_four_times(smoothed(losses))
    y = average[len(rates) // 10 : -5]
    x = rates[len(rates) // 10 :][: len(y)]
    if len(y) < 3:
        return dict.fromkeys(("valley", "steep", "minimum"))
    length = np.ones(len(y), int)
    last, first = 0, 0
    for i in range(1, len(y)):
        higher = y[:i] > y[i]
        length[i] = 1 + (length[:i][higher].max() if higher.any() else 0)
        if length[i] > length[last]:
            last, first = i, i - length[i]  # where the longest descent would begin, were it without gaps
    third = (last - first) / 3
    slopes = np.diff(y) / np.diff(np.log(x))
    valley = x[max(0, first + int(third) + int(third / 2))]
    return {"valley": float(valley), "steep": float(x[slopes.argmin()]), "minimum": float(x[y.argmin()] / 10)}


def lightning(rates: np.ndarray, losses: np.ndarray) -> float | None:
    """Lightning's suggestion: where the average falls fastest, without ten steps at the start and one at the end."""
    y = until_four_times(smoothed(losses))[10:-1]
    if len(y) < 2:
        return None
    slopes = np.gradient(y, rates[10 : 10 + len(y)])  # by the rate, not by its logarithm
    return float(rates[10 + int(slopes.argmin())])


def others(task: Task, seed: int) -> dict[str, float | None]:
    """Their suggestions, in the ranges that are their defaults, with the steps of one training each."""
    batches, same = batches_of(task, seed)
    run = loop(task, same, lambda state, rate: jaxsgd.with_hyper(state, learning_rate=rate))
    spans = [np.geomspace(low, high, task.steps) for low, high in ((1e-7, 10.0), (1e-8, 1.0))]
    params, key = task.init(jax.random.key(seed)), jax.random.key(seed)
    fn = jax.jit(jax.vmap(lambda *args: run(*args)[1], in_axes=(0, None, None, None)))
    losses = np.asarray(fn(jnp.asarray(np.stack(spans), jnp.float32), params, key, batches), np.float64)
    with np.errstate(all="ignore"):
        return fastai(spans[0], losses[0]) | {"lightning": lightning(spans[1], losses[1])}


# Scores


class Score(NamedTuple):
    """One suggestion in a full training.

    Attributes:
      rate: the suggestion, or None.
      ratio: its final loss over that of the best rate; infinite where it diverged.
      part: the part of the best decrease of the loss.
      metric: the held-out metric less that of the best rate.
      needed: the part of the steps that the best rate needs to reach its final loss.
    """

    rate: float | None
    ratio: float
    part: float
    metric: float
    needed: float


def score(runs: Runs, tried: Runs, i: int, rate: float | None) -> Score:
    ends, best = runs.ends, int(np.argmin(runs.ends))
    low = float(ends[best])
    if rate is None or tried.diverged[i]:
        return Score(rate, np.inf, -np.inf, float("nan"), 0.0)
    end = float(tried.ends[i])
    last = max(1, runs.losses.shape[1] // 20)
    average = np.convolve(runs.losses[best], np.ones(last) / last, mode="valid")
    reached = average <= end
    needed = (int(reached.argmax()) + last) / runs.losses.shape[1] if reached.any() else 1.0
    ratio = max(end, 1e-12) / max(low, 1e-12)
    metric = float(tried.metric[i]) - float(runs.metric[best])
    return Score(rate, ratio, float((runs.start - end) / (runs.start - low)), metric, needed)


class Outcome(NamedTuple):
    """A task with one seed."""

    task: str
    data_set: str
    seed: int
    steps: int
    best: float
    end: float
    confidence: str
    cost: float
    scores: dict[str, Score]


def outcome(task: Task, seed: int, share: float, baselines: bool) -> Outcome:
    runs = truth(task, seed)
    params = task.init(jax.random.key(seed))
    found = jaxsgd.probe(task.loss_fn, params, task.data(seed), task.rule, steps=task.steps, share=share, key=seed)
    rates = {"probe": found.learning_rate, "usual": usual_rate(task.rule, params)[0]}
    rates |= others(task, seed) if baselines else {}
    tried = train(task, [runs.rates[0] if rate is None else rate for rate in rates.values()], seed)
    scores = {which: score(runs, tried, i, rate) for i, (which, rate) in enumerate(rates.items())}
    best = int(np.argmin(runs.ends))
    end = float(runs.ends[best])
    rate = float(runs.rates[best])
    return Outcome(task.name, task.data_set, seed, task.steps, rate, end, found.confidence, found.share, scores)


def interval(values: np.ndarray, statistic: Callable[[np.ndarray], float], sets: Sequence[str]) -> tuple[float, float]:
    """95% of a bootstrap over data sets, as tasks on one data set are alike."""
    rng, names = np.random.default_rng(0), np.unique(sets)
    groups = [values[np.asarray(sets) == name] for name in names]
    draws = [
        statistic(np.concatenate([groups[i] for i in rng.integers(0, len(names), len(names))])) for _ in range(1000)
    ]
    return float(np.percentile(draws, 2.5)), float(np.percentile(draws, 97.5))


def summary(found: Sequence[Outcome]) -> Table:
    """A row for each way to suggest."""
    rows = []
    sets = [f.data_set for f in found]
    for which in SUGGESTED:
        if which not in found[0].scores:
            continue
        scores = [f.scores[which] for f in found]
        ratios, parts = np.array([s.ratio for s in scores]), np.array([s.part for s in scores])
        low, high = interval(parts, lambda x: float(np.mean(x >= ENOUGH)), sets)
        absent = sum(s.rate is None for s in scores)
        blown = int(np.isinf(ratios).sum()) - absent
        with np.errstate(all="ignore"):
            worse = float(np.nanmedian([s.metric for s in scores]))
        rows.append(
            (
                which, float(np.mean(ratios > 2)), float(np.median(ratios)), float(np.mean(parts >= ENOUGH)),
                f"{low:.0%} to {high:.0%}", worse, float(np.median([s.needed for s in scores])), blown, absent,
            )
        )  # fmt: skip
    columns = (
        Column("suggestion", kind="text"), Column("ratio above 2", kind="share"), Column("median ratio"),
        Column("95% of the decrease", kind="share"), Column("interval", kind="text"), Column("metric"),
        Column("steps needed", kind="share"), Column("diverged"), Column("none"),
    )  # fmt: skip
    return Table(columns, tuple(rows))


def named(tasks: Sequence[str]) -> str:
    """Each task once, as code."""
    return ", ".join(f"`{task}`" for task in dict.fromkeys(tasks)) or "none"


def calibration(found: Sequence[Outcome]) -> str:
    lines = []
    blown = [f.task for f in found if f.scores["probe"].ratio > 2]
    lines.append(f"ratio above 2: {named(blown)}")
    missed = [f.task for f in found if f.scores["probe"].part < ENOUGH]
    lines.append(f"below 95%: {named(missed)}")
    for level in ("high", "medium", "low"):
        parts = np.array([f.scores["probe"].part for f in found if f.confidence == level])
        if len(parts):
            count = f"{len(parts)} suggestion{'s' * (len(parts) > 1)}"
            lines.append(f'"{level}": {count}, {np.mean(parts >= ENOUGH):.1%} right')
    logs = [np.log(f.scores["probe"].rate / f.best) for f in found if f.scores["probe"].rate]
    factor = float(np.exp(np.median(logs)))
    lines.append(f"suggested / best rate: median {factor:.2f}")
    lines.append(f"cost: at most {max(f.cost for f in found):.2f} full runs")
    return "\n".join(f"- {line}" for line in lines)


def rows_of(found: Sequence[Outcome]) -> Table:
    """A row for each task: over seeds the median ratio and the lowest part."""
    rows = []
    for name in dict.fromkeys(f.task for f in found):
        here = [f for f in found if f.task == name]
        ours = [f.scores["probe"] for f in here]
        sure = "/".join(dict.fromkeys(f.confidence for f in here))
        metric = float(np.mean([s.metric for s in ours]))
        steep = [f.scores[w].part for f in here for w in ("valley",) if w in f.scores]
        rows.append(
            (
                name, here[0].steps, here[0].best, ours[0].rate, float(np.median([s.ratio for s in ours])),
                min(s.part for s in ours), metric, float(np.median([s.needed for s in ours])), sure,
                max(min(steep), -9.99) if steep else None,
            )
        )  # fmt: skip
    columns = (
        Column("task", kind="text"), Column("steps"), Column("best"), Column("probe"), Column("ratio"),
        Column("part", kind="share"), Column("metric"), Column("needed", kind="share"), Column("sure", kind="text"),
        Column("valley's part", kind="share"),
    )  # fmt: skip
    return Table(columns, tuple(rows))


def lead(found: Sequence[Outcome]) -> str:
    """The unflattering numbers first."""
    scores = [f.scores["probe"] for f in found]
    none = sum(s.rate is None for s in scores)
    worse, missed = sum(s.ratio > 2 for s in scores) - none, sum(s.part < ENOUGH for s in scores) - none
    blown = sum(s.ratio == np.inf for s in scores) - none
    sure = [s for s, f in zip(scores, found, strict=True) if f.confidence == "high"]
    wrong, count = sum(s.part < ENOUGH for s in sure), len(scores)
    median = float(np.median([s.ratio for s in scores]))
    low, high = interval(
        np.array([s.ratio for s in scores]), lambda x: float(np.median(x)), [f.data_set for f in found]
    )
    ends = "of these rates diverges" if blown == 1 else "of these rates diverge"
    return (
        f"of {count} runs of the probe {none} suggest nothing. {worse} ({worse / count:.0%}) suggest a rate that ends "
        f"at more than twice the best loss; {blown} {ends}. {missed} ({missed / count:.0%}) miss 95% of the best "
        f'decrease. Of {len(sure)} suggestions with "high" confidence {wrong} miss it. The median ratio of the final '
        f"losses is {median:.2f} (95% interval {low:.2f} to {high:.2f})."
    )


def page(found: Sequence[Outcome]) -> str:
    drawn = [f for f in found if f.task not in TASKS]
    held = [f for f in found if f.task in HELD_OUT]
    lines = ["# How good the suggested learning rates are"]
    if drawn:
        lines += ["", f"On data sets that played no part in the design, tasks drawn at random: {lead(drawn)}"]
    if held:
        lines += ["", f"On other data sets that played no part in it, tasks that were chosen: {lead(held)}"]
    lines += ["", INTRO]
    if drawn:
        count, sets = len({f.task for f in drawn}), len({f.data_set for f in drawn})
        lines += [
            "",
            "## Random tasks",
            "",
            f"{count} tasks on {sets} of R's data sets (`benchmarks/random_tasks.py`).",
        ]
        lines += ["", summary(drawn).markdown(), "", calibration(drawn)]
    for title, names in (("Held-out data sets", HELD_OUT), ("Data sets of the design", DESIGN)):
        here = [f for f in found if f.task in names]
        if here:
            sets = ", ".join(dict.fromkeys(f.data_set for f in here))
            count = len({f.task for f in here})
            seeds = 1 + max(f.seed for f in here)
            lines += [
                "",
                f"## {title}",
                "",
                f"{count} tasks on {sets}; {seeds} seed{'s' * (seeds > 1)}.",
                "",
                summary(here).markdown(),
                "",
            ]
            lines += [calibration(here), "", rows_of(here).markdown()]
    return "\n".join(lines) + "\n"


SCRIPT = "python benchmarks/probe_learning_rates.py"
INTRO = f"""Made by `{SCRIPT}`, with `--save` and `--parts`, from `--tasks held-out --seeds 3`,
`--tasks design` and `--tasks none --random 150`; not written by hand.

A task is a data set, a model, a rule, a batch size and 100 to 3,000 steps (`benchmarks/learning_rate_tasks.py`). Full
runs at 49 rates, a factor of 1.33 apart, are the truth. The final loss is the mean of the last 5% of the steps.

- ratio: the final loss at the suggestion over that at the best rate. Losses that approach zero make it large.
- part: the part of the best decrease of the loss, (start - end) / (start - end at the best rate).
- metric: accuracy, or the variance explained, on held-out examples, less that of the best rate.
- needed: the part of the steps that the best rate needs to reach the suggestion's final loss.
- interval: 95%, from a bootstrap over data sets.
- valley's part: -999 where the training at that rate diverged.

`valley`, `steep` and `minimum` are fastai's suggestions, `lightning` is Lightning's. Both have their smoothing, range
and skipped points, and as many steps as one training. `usual` is the rule's usual rate, without any search.

A cheaper probe is worse. With `--tasks held-out --share 0.25`, seed 0, 85% reach 95% of the best decrease, and 12% have
a ratio above 2 or get no suggestion. "High" confidence is right in 14 of 16. Four tasks (airports) were repaired
after their first run: they had one output less than classes."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Score the probe's suggestions against full trainings.")
    parser.add_argument("--write", type=pathlib.Path, help="write the page to this file")
    parser.add_argument("--save", type=pathlib.Path, help="save the outcomes to this file")
    parser.add_argument("--parts", type=pathlib.Path, nargs="*", default=[], help="outcomes that were saved, to add")
    parser.add_argument("--tasks", default="all", help="design, held-out, all, none, or names divided by commas")
    parser.add_argument("--random", type=int, default=0, metavar="COUNT", help="further tasks, drawn at random")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of weights, batches and dropout")
    parser.add_argument("--share", type=float, default=1.0, help="of the probe")
    parser.add_argument("--no-baselines", action="store_true", help="the probe alone")
    args = parser.parse_args()
    sets = {"design": DESIGN, "held-out": HELD_OUT, "all": (*HELD_OUT, *DESIGN)}
    names = [] if args.tasks == "none" else sets.get(args.tasks) or args.tasks.split(",")
    found = [_shown(TASKS[name](), seed, args) for seed in range(args.seeds) for name in names]
    found += [_shown(task, 0, args) for task in random_tasks(args.random)]
    for part in args.parts:
        rows = json.loads(part.read_text())
        found += [Outcome(*row[:-1], {which: Score(*score) for which, score in row[-1].items()}) for row in rows]
    print(f"\n{summary(found).text(120)}\n{calibration(found)}")
    if args.save:
        args.save.write_text(json.dumps(found))
    if args.write:
        args.write.write_text(page(found))


def _shown(task: Task, seed: int, args: argparse.Namespace) -> Outcome:
    begin = time.perf_counter()
    found = outcome(task, seed, args.share, not args.no_baselines)
    ours, seconds = found.scores["probe"], time.perf_counter() - begin
    rate = "none" if ours.rate is None else f"{ours.rate:.3g}"
    print(
        f"{task.name:36} {seed}  best {found.best:<9.3g} probe {rate:<9} ratio {ours.ratio:<9.3g} "
        f"part {ours.part:7.1%}  {found.confidence:7} {seconds:.0f} s",
        flush=True,
    )
    return found


if __name__ == "__main__":
    main()
