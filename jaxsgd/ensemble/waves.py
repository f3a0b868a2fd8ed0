"""More runs than fit in memory: wave after wave through one compiled program, on the disk if asked for."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsgd.ensemble.dealer import Dealer
from jaxsgd.ensemble.divergence import IN_A_ROW, least_losses, risen
from jaxsgd.ensemble.feed import Feed
from jaxsgd.ensemble.population import Population, free_bytes
from jaxsgd.numerics import is_key
from jaxsgd.progress import Bar

__all__ = ["Trained", "described", "gone", "stacked_rows", "train_in_waves", "wave_size"]


class Trained(NamedTuple):
    """The result of `train_in_waves`.

    Attributes:
      metrics: name -> ``(members, steps)``; NaN from where a run diverged.
      diverged_at: ``(members,)``, the steps taken when it diverged, or -1.
      states: the last states, stacked: on the devices, of several waves on the host.
      population: of the last wave.
      waves: their number.
    """

    metrics: dict[str, np.ndarray]
    diverged_at: np.ndarray
    states: Any
    population: Population
    waves: int


def wave_size(members: int, devices: Sequence[Any], each: float, memory: float | None, shared: float = 0.0) -> int:
    """The number of runs that train at once: as many as fit, in waves of about one size.

    Args:
      members: the number of runs.
      devices: those that share a wave.
      each: bytes of one run's state.
      memory: bytes of a device that states may take. Default: half of what is free, if that is known; temporaries have
        the other half.
      shared: bytes that a device needs for all runs together, such as the initial parameters.

    Raises:
      ValueError: ``memory`` is too small for one run.
    """
    dealer = Dealer(devices, members)
    free = free_bytes(dealer.local) if memory is None else None
    room = memory if free is None else free / 2
    rows = members if room is None else int((room - shared) // max(each, 1.0))
    if rows < 1 and memory is not None:
        raise ValueError(
            f"memory={memory}: one run's state takes {each:.0f} bytes, and {shared:.0f} are shared. Use at least "
            f"memory={each + shared:.0f}"
        )
    at_once = int(dealer.least(max(1, rows))) * len(dealer.devices)
    return -(-members // -(-members // at_once))


def gone(losses: np.ndarray, limit: float) -> np.ndarray:
    """``(members, steps)`` bool: whether a run has diverged before or at a step, judged by all runs together."""
    none = np.zeros((len(losses), IN_A_ROW - 1), bool)
    rose, _ = risen(losses, least_losses(losses), limit, none)
    out = ~np.isfinite(losses) | (rose[:, None] >= 0) & (np.arange(losses.shape[1]) >= rose[:, None])
    return np.maximum.accumulate(out, axis=1)


def train_in_waves(
    build: Callable[..., Any],
    members: Mapping[str, np.ndarray],
    feed: Feed,
    steps: int,
    *,
    given: Any,
    size: int,
    strategy: str,
    devices: Sequence[Any],
    limit: float,
    memory: float | None,
    directory: str | os.PathLike[str] | None,
    save_every: int,
    bar: Bar,
) -> Trained:
    """Train all members on the same batches, ``size`` of them at once; see `Population` for the arguments.

    With a ``directory``, a wave is saved every ``save_every`` steps and at its end. A later call continues from there.
    """
    count = len(next(iter(members.values())))
    starts = range(0, count, size)
    folder = None if directory is None else pathlib.Path(directory)
    tables: list[dict[str, np.ndarray]] = []
    ends: list[tuple[np.ndarray, Any]] = []
    population: Population | None = None
    for wave, first in enumerate(starts):
        index = np.minimum(np.arange(first, first + size), count - 1)
        values = {name: x[index] for name, x in members.items()}
        if population is None:
            population = Population(
                build, values, given=given, strategy=strategy, devices=devices, limit=limit, memory=memory
            )
        else:
            population.renew(values)
            feed.rewind()
        here = min(size, count - first)
        label = f"wave {wave + 1} of {len(starts)}, " if len(starts) > 1 else ""
        place = None if folder is None else folder / f"wave-{wave:04d}"
        table = _train(population, here, feed, steps, place, save_every, bar, label)
        tables.append({name: table[:here, :, i] for i, name in enumerate(population.names)})
        last = population.states if len(starts) == 1 else population.host_states
        ends.append((population.diverged_at[:here], jax.tree.map(lambda x, n=here: x[:n], last)))
    assert population is not None
    metrics = {name: np.concatenate([part[name] for part in tables]) for name in tables[0]}
    diverged_at = np.concatenate([at for at, _ in ends])
    if len(starts) == 1:
        return Trained(metrics, diverged_at, ends[0][1], population, 1)
    dead = gone(metrics["loss"], limit)  # with the losses of waves that were trained later
    metrics = {name: np.where(dead, np.nan, x) for name, x in metrics.items()}
    diverged_at = np.where(dead.any(axis=1), dead.argmax(axis=1), diverged_at)
    states = jax.tree.map(lambda *xs: stacked_rows(xs), *(states for _, states in ends))
    return Trained(metrics, diverged_at, states, population, len(starts))


def _train(
    population: Population, here: int, feed: Feed, steps: int, place: Any, save_every: int, bar: Bar, label: str
) -> np.ndarray:
    """One wave, from where it was saved: ``(members, steps, names)``. Only the first ``here`` members are trained."""
    wanted = np.arange(population.members) < here
    population.look(jax.tree.map(lambda x: np.asarray(x)[None], feed.peek()))
    table = np.full((population.members, steps, len(population.names)), np.nan, np.float32)
    with _opened(place, save_every) as saved:
        state = lambda: {"population": population.snapshot, "table": population.share(table)}  # noqa: E731
        if saved is not None and saved.latest is not None:
            back = saved.restore(state())
            population.snapshot, table = back.state["population"], population.fetch(back.state["table"]).copy()
            bar.advance(back.step, f"{label}continues after step {back.step}")
            done = back.step
            feed.skip(done if done < steps else 0)
        else:
            done = 0
        while done < steps:
            until = min(done + 4 * population.chunk, steps)
            if saved is not None:  # a piece ends where it is saved
                until = min(until, done - done % save_every + save_every)
            part = population.advance(feed.take(until - done), wanted)
            table[:, done:until] = np.stack([part[name] for name in population.names], axis=-1)
            bar.advance(until - done, label + _standing(population, part["loss"][:, -1], wanted))
            done = until if np.any(population.alive & wanted) else steps
            if saved is not None and done == steps:
                saved.save(state(), step=steps, wait=True)
            elif saved is not None:
                saved.after(done, state())
    return table


def _standing(population: Population, losses: np.ndarray, wanted: np.ndarray) -> str:
    least = f"{np.nanmin(losses):.4g}" if np.any(np.isfinite(losses)) else "none left"
    return f"least loss {least}, {int((~population.alive & wanted).sum())} diverged"


def _opened(place: pathlib.Path | None, every: int) -> Any:
    if place is None:
        return contextlib.nullcontext()
    from jaxsgd.checkpoint import Checkpoints

    return Checkpoints(place, keep=1, every=every)


def stacked_rows(parts: Sequence[Any]) -> Any:
    """Arrays one after the other along the first axis, on the host; typed keys remain arrays of JAX."""
    return jnp.concatenate(parts) if is_key(parts[0]) else np.concatenate(parts)


def described(folder: pathlib.Path, about: dict[str, Any], size: int) -> int:
    """Write down which sweep a folder holds, and return the size of its waves: that of the first call.

    Raises:
      ValueError: the folder holds another sweep. The message names the differences.
    """
    file = folder / "sweep.json"
    about = json.loads(json.dumps(about))
    if file.exists():
        held = json.loads(file.read_text())
        for name, value in about.items():
            if held.get(name) != value:
                raise ValueError(
                    f"directory={str(folder)!r}: it holds another sweep, with {name}={held.get(name)!r}, "
                    f"not {value!r}. Use another directory"
                )
        return int(held["at_once"])
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(about | {"at_once": size}))
        part.replace(file)
    return size
