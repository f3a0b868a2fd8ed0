"""Checkpoints: a run on disk, so that one that was killed goes on as if it had not been.

The only import of orbax.checkpoint, which writes and reads the arrays. Added here: checksums, when a checkpoint counts
as saved, which may be deleted, dtypes, SIGTERM.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import shutil
import signal
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxsgd.checkpoint.averages import averaged as average_of
from jaxsgd.checkpoint.averages import find_averages
from jaxsgd.checkpoint.description import Description, LeafInfo, described
from jaxsgd.checkpoint.leaves import compare, pack, put, targets, unpack
from jaxsgd.checkpoint.lock import DirectoryInUse, Lock
from jaxsgd.checkpoint.manifest import ASIDE, Found, clear_partial, damage, find, inspect, remove, seal
from jaxsgd.checkpoint.partial import Filling, fill, nested, open_tree
from jaxsgd.checkpoint.peers import Peers
from jaxsgd.checkpoint.retention import Retention
from jaxsgd.models import is_module
from jaxsgd.paths import named_leaves

__all__ = ["Checkpoints", "Description", "DirectoryInUse", "LeafInfo", "Restored"]

TOGETHER = 30.0
"""Seconds that the processes of a run have to agree on where to stop after a save failed on one."""


class Restored(NamedTuple):
    """The result of `Checkpoints.restore`.

    Attributes:
      state: like the state it was asked for, array by array where that one's shardings say.
      data: the position of the data, as it was given to `Checkpoints.save`, or None.
      step: completed steps.
      report: what `jaxsgd.migration` kept, reset and dropped; None without ``migrate=True``.
    """

    state: Any
    data: Any
    step: int
    report: Any = None


class Checkpoints:
    """The checkpoints of one run in one directory: saved in the background, checksummed, the newest few kept.

        with Checkpoints("runs/1", keep=3, every=1000) as checkpoints:
            index = 0
            if checkpoints.latest is not None:
                state, index, _, _ = checkpoints.restore(state)
            for index in range(index, steps):
                state, metrics = step(state, batches[index])
                checkpoints.after(index + 1, state, data=index + 1)

    A checkpoint counts as saved once a manifest with the checksum of each of its files is on the disk. A run that
    is killed before that continues from the one before. All saves of a run must happen inside ``with``; several
    processes call every method together. ``directory`` must be one that all processes see.

    Inside ``with`` the run holds the lock of the directory: another run is refused. A lock is given back at the end of
    ``with``, when the object goes, and when its process dies. Outside ``with`` nothing is locked: `restore`, `saved`
    and `latest` work beside a run that saves.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 3,
        every: int = 1000,
        keep_best: int = 0,
        best_mode: Literal["min", "max"] = "min",
        keep_every: int | None = None,
    ) -> None:
        """
        Args:
          directory: made if missing.
          keep: how many of the newest checkpoints remain; an older one is deleted after the newer one is saved, never
            before. Default: 3.
          every: steps from one checkpoint to the next (see `after`). Default: 1000.
          keep_best: how many remain besides because of their ``metric`` (see `save`). One that was saved without a
            metric, or with one that is not finite, is never among them. Default: 0.
          best_mode: ``"min"`` or ``"max"``: which metric is the best. Default: ``"min"``.
          keep_every: checkpoints whose step is a multiple are never deleted. Default: None, no such.

        Raises:
          ValueError: ``keep``, ``every`` or ``keep_every`` below 1, ``keep_best`` below 0, another ``best_mode``, or
            ``directory`` is no path of a mounted file system.
          NotADirectoryError: ``directory`` is a file.
          OSError: it cannot be made.
        """
        counts = {"keep": (keep, 1), "every": (every, 1), "keep_best": (keep_best, 0)}
        counts |= {} if keep_every is None else {"keep_every": (keep_every, 1)}
        for name, (value, least) in counts.items():
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise ValueError(f"{name}={value!r}: it must be {least} or more. Use a whole number")
        if best_mode not in ("min", "max"):
            raise ValueError(f'best_mode={best_mode!r}: use "min" for a loss, "max" for an accuracy')
        if "://" in os.fspath(directory):
            raise ValueError(f"directory={os.fspath(directory)!r}: give the path where that storage is mounted")
        self.directory = pathlib.Path(directory).absolute()
        self.keep, self.every = keep, every
        self._retention = Retention(keep, keep_best, best_mode, keep_every or 0)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise NotADirectoryError(f"directory={str(directory)!r}: {error.filename!r} is a file") from None
        except OSError as error:
            raise type(error)(f"directory={str(directory)!r}: it cannot be made: {error}") from None
        self._writer: ocp.AsyncCheckpointer | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saving, self._metric = -1, None
        self._bad: set[tuple[pathlib.Path, float]] = set()
        self._peers: Peers | None = None
        self._lock: Lock | None = None
        self._give_back: Callable[[], object] | None = None
        # Of several processes one may fail in the background: all then leave at the same call of `after`.
        self._turn, self._calls, self._failing, self._last_call = threading.Lock(), 0, False, 0
        self._terminated = False
        self._handler: Any = None

    def __enter__(self) -> Checkpoints:
        """Ready to save; SIGTERM now means: save at the next `after` and leave.

        Raises:
          DirectoryInUse: another run saves into ``directory``, or this object is open already.
          OSError: nothing can be written into ``directory``.
        """
        if self._writer is not None:
            raise DirectoryInUse(f"directory={str(self.directory)!r}: these checkpoints are open already")
        self._peers, lock, failure = Peers(), None, None
        try:
            with tempfile.TemporaryFile(dir=self.directory):
                pass
            lock = Lock(self.directory) if self._peers.index == 0 else None
        except DirectoryInUse as error:
            failure = error
        except OSError as error:
            failure = type(error)(f"directory={str(self.directory)!r}: it cannot be written: {error}")
        told = self._peers.gather("open", "" if failure is None else f"{type(failure).__name__}\n{failure}")
        if any(told):
            if lock is not None:
                lock.release()
            kind, _, text = next(filter(None, told)).partition("\n")
            raise (failure or (DirectoryInUse if kind == "DirectoryInUse" else OSError)(text)) from None
        if lock is not None:
            self._give_back = weakref.finalize(self, lock.release)
        self._lock, self._calls, self._failing = lock, 0, False
        self._writer, self._terminated = _checkpointer(self._peers), False
        # With several processes jax.distributed has taken the signal, so that all stop after the same step.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._handler = signal.getsignal(signal.SIGTERM)
            signal.signal(signal.SIGTERM, _on_sigterm(weakref.ref(self), self._handler))
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Wait for the save under way. An exception of the loop goes on; that of a failed save is added to it."""
        try:
            if error is None:
                self.wait()
            elif self._thread is not None:
                # The other processes may not be here: nothing that needs their answer.
                self._thread.join()
                if self._error is not None:
                    error.add_note(self._failure(_line(self._error)))
        finally:
            if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, self._handler or signal.SIG_DFL)
            writer, self._writer, self._thread, self._error = self._writer, None, None, None
            with contextlib.suppress(Exception):  # it has been told above
                writer.close()  # type: ignore[union-attr]
            if self._give_back is not None:
                self._give_back()
            self._lock = self._give_back = None
        if error is None and self._terminated:
            raise SystemExit(143)

    @property
    def saved(self) -> list[int]:
        """The steps whose checkpoints are complete on the disk, oldest first. The checkpoint
        of such a step survives a kill. `restore` checks that its files have not changed."""
        return list(dict.fromkeys(each.step for each in find(self.directory) if each.files is not None))[::-1]

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, None where there is none."""
        return (self.saved or [None])[-1]

    @property
    def best(self) -> int | None:
        """The step of the complete checkpoint with the best metric, None where none has one."""
        ranked = self._retention.ranked(find(self.directory), self._bad)
        return ranked[0].step if ranked else None

    def describe(self, step: int | None = None) -> Description:
        """The contents of a checkpoint: leaves with shapes, dtypes and bytes, slots of the optimizer, metric, position.

        No array is read, no lock is needed. ``print(checkpoints.describe())`` shows it as a table.

        Args:
          step: of which checkpoint. Default: the newest good one.

        Returns:
          A `Description`.

        Raises:
          FileNotFoundError, ValueError: as `restore`, if there is no such checkpoint or no good one.
        """
        path, about = self._reading(step, lambda path, about: (path, about))
        found = find(self.directory)
        metrics = {each.step: each.metric for each in found if each.files is not None and each.metric is not None}
        (here,) = [each for each in found if each.path == path] or [inspect(path)]
        files = sum(size for size, _ in (here.files or {}).values())
        return described(about, self.saved, metrics, here.metric, files)

    def after(self, step: int, state: Any, *, data: Any = None, metric: Any = None) -> None:
        """To be called after each step: saves every ``every`` steps; after a SIGTERM saves at once and leaves.

        Args:
          step: completed steps, counted on the host, so that nothing waits for the device. Several processes stop
            together only if each calls this after every step.
          state, data, metric: see `save`. They are read only when it saves.

        Raises:
          SystemExit: 143, when the process is asked to terminate and the state is saved.
          OSError: an earlier save failed in the background. Of several processes all raise it, after the same step.
          DirectoryInUse: see `save`.
        """
        if self._failed_somewhere():
            self.wait()
        if self._must_leave(step):
            try:
                self.wait()
            except OSError as error:
                warnings.warn(str(error), RuntimeWarning, stacklevel=2)
            if self._saving != step or step not in self.saved:
                self.save(state, data=data, step=step, metric=metric, wait=True)
            raise SystemExit(143)
        if step % self.every == 0:
            self.save(state, data=data, step=step, metric=metric)
        elif jax.process_count() == 1 and self._thread is not None and not self._thread.is_alive():
            self.wait()

    def save(
        self, state: Any, *, data: Any = None, step: int | None = None, metric: Any = None, wait: bool = False
    ) -> None:
        """Save in the background; the state may be donated to the next step at once.

        A checkpoint of the same step is replaced, and is there until the new one is complete.

        Args:
          state: any tree of arrays, typed PRNG keys included, usually a `jaxsgd.TrainState`.
          data: the position in the data: what JSON can hold, of several processes that of the first.
          step: completed steps, by default ``state.step``.
          metric: a number by which ``keep_best`` and `best` judge, such as a validation loss; of several processes that
            of the first. Default: None.
          wait: return when it is complete on the disk.

        Raises:
          RuntimeError: outside ``with``, or the state was donated to a step.
          TypeError, ValueError: a leaf that is no array, two leaves of one name, no ``step``, ``data`` is not JSON,
            ``metric`` is no number.
          OSError: this save, or the one before, failed, on any process. Earlier checkpoints remain.
          DirectoryInUse: the lock of the directory was deleted or taken over.
        """
        if self._writer is None:
            raise RuntimeError("save: open the checkpoints first: with Checkpoints(...) as checkpoints:")
        if step is None and not hasattr(state, "step"):
            raise ValueError("step: the state has no step of its own; say how many are completed")
        step = int(state.step if step is None else step)
        if step < 0:
            raise ValueError(f"step={step}: it must be 0 or more")
        try:
            data = json.loads(json.dumps(data))  # a copy: an iterator may go on with its own
        except (TypeError, ValueError) as error:
            raise TypeError(f"data={data!r}: give the position as JSON holds it ({error})") from None
        try:
            metric = None if metric is None else float(metric)
        except (TypeError, ValueError) as error:
            raise TypeError(f"metric={metric!r}: a number is needed ({error}). Use a scalar or None") from None
        self.wait()
        self._saving, self._metric = step, metric
        assert self._peers is not None
        table, arrays = pack(named_leaves(state, "state"))
        about = {"step": step, "data": data, "leaves": table, "averages": find_averages(state)}
        items = ocp.args.Composite(state=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about))
        self._peers.begin()
        failure: Exception | None = None
        try:
            if self._lock is not None:
                self._lock.check()
                self._make_room(step)
            elif self._peers.index:
                with tempfile.TemporaryFile(dir=self.directory) as probe:
                    probe.write(b"0")
        except Exception as error:
            failure = error
        self._agree("start", failure)
        try:
            self._writer.save(self.directory / str(step), args=items)
        except Exception as error:
            if self._peers.count == 1:
                self._recover()
                raise OSError(self._failure(_line(error))) from error
            self._error = error
        self._thread = threading.Thread(target=self._complete, args=(step,), name=f"checkpoint-{step}")
        self._thread.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait until the save under way, if any, is complete on the disk.

        Raises:
          OSError: it failed. The message has the reason and the checkpoints that are left. The next save starts afresh.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread, error, self._error, self._failing = None, self._error, None, False
        self._agree("end", error)

    def _agree(self, stage: str, error: BaseException | None) -> None:
        """Raise on all processes if there is an error on one."""
        assert self._peers is not None
        told = self._peers.gather(stage, "" if error is None else _line(error))
        if not any(told):
            return
        self._recover()
        if isinstance(error, DirectoryInUse):
            raise error
        # The cause, not that the others noticed it.
        own = [(index, text) for index, text in enumerate(told) if text and not text.startswith("PeerError")]
        index, why = (own or [(0, next(filter(None, told)))])[0]
        why = why if self._peers.count == 1 else f"process {index} of {self._peers.count}: {why}"
        raise OSError(self._failure(why)) from error

    def _failed_somewhere(self) -> bool:
        """Count a call of `after`; whether it is the one at which all processes tell the failure of a save."""
        if self._peers is None or self._peers.count == 1:
            return False
        with self._turn:
            self._calls += 1
            failing = self._failing
        if not failing or self._thread is None:
            return False
        self._thread.join()
        return self._calls >= self._last_call

    def restore(
        self, like: Any, *, step: int | None = None, migrate: bool = False, tx: Any = None, old_tx: Any = None
    ) -> Restored:
        """Read the newest good checkpoint. One that is damaged is passed over with a warning.

        Args:
          like: a state, or its shapes with their shardings, which say where each array goes: any number of devices,
            any mesh. Its values are not used.
          step: this checkpoint and no other.
          migrate: take ``opt_state`` over by name where the optimizer was edited, see `jaxsgd.migration`. The rest
            stays as it is in ``like``, which must be a state.
          tx, old_tx: with ``migrate``, the new optimizer and the one that was saved, for storages of your own. Default:
            unknown.

        Returns:
          `Restored`.

        Raises:
          FileNotFoundError: there is no checkpoint, or not that of ``step``.
          ValueError: no checkpoint is good (the error names the fault of each); the checkpoint is of another model (it
            names the paths that differ); ``migrate`` with a ``like`` that is no state.
        """
        if self._writer is not None:
            self.wait()
        leaves = named_leaves(like, "like")
        if migrate and not (hasattr(like, "opt_state") and hasattr(like, "params")):
            raise ValueError(f"migrate=True: like is a {type(like).__name__} without opt_state and params")
        table, about, read = self._reading(step, functools.partial(self._read_all, leaves, migrate))
        moved = {name for name in {**table, **leaves} if migrate and name.startswith("opt_state/")}
        report = None
        if migrate:
            from jaxsgd.migration import adopt

            old = {name.removeprefix("opt_state/"): read.pop(name) for name in table if name in moved}
            fresh = _fresh(like, {name: read.get(name) for name in leaves}, tx)
            adopted, report = adopt(old, fresh, like.params, tx=tx, old_tx=old_tx)
            names = {"opt_state/" + name: leaf for name, leaf in named_leaves(adopted, "opt_state").items()}
            read |= {name: put(leaf, leaves[name]) for name, leaf in names.items()}
        state = jax.tree.unflatten(jax.tree.structure(like), [read[name] for name in leaves])
        if self._writer is not None and jax.process_count() > 1:
            # A step that a resumed run never takes; and from now on they agree on one after that restored.
            self._terminated = _told_to_stop_at(1)
            _told_to_stop_at(about["step"])
        return Restored(state, about["data"], about["step"], report)

    def restore_params(
        self,
        like: Any = None,
        *,
        part: str = "params",
        step: int | None = None,
        dtype: Any = None,
        averaged: bool = False,
        partial: bool = False,
        rename: Callable[[str], str] | None = None,
    ) -> Restored:
        """Read the weights alone, for inference, fine-tuning or another dtype. The optimizer need not be known.

        Only the arrays that are asked for come into memory. No lock is needed.

            params, *_ = checkpoints.restore_params()  # nested dicts of NumPy arrays
            model, *_ = checkpoints.restore_params(MLP(nnx.Rngs(0)), averaged=True)
            params, _, _, report = checkpoints.restore_params(new_head_params, partial=True)

        Args:
          like: a tree of arrays or of shapes: each array goes where its namesake is, in its dtype. Or an
            `nnx.Module`: its variables other than `nnx.Param` are read too, and a module is returned. Default: None,
            nested dicts of NumPy arrays as they were saved.
          part: which part of the state ``like`` is: ``"params"``, ``"model_state"``, or the key of a dict that was
            saved. Default: ``"params"``.
          step: this checkpoint and no other, as in `restore`.
          dtype: of floating leaves, in place of their own. Default: None.
          averaged: the averages of `jaxsgd.eval_params` in place of the parameters, where there are any.
          partial: keep the leaves that fit by name and shape; the others stay as they are in ``like``: for a new head
            or an added adapter. The report lists both. Default: False, a leaf without counterpart is an error.
          rename: name in ``like`` -> name in the checkpoint, both with the part in front:
            ``lambda name: name.replace("params/base/", "params/")``. Default: the same names.

        Returns:
          `Restored`, with the weights as ``state``. The report has in ``kept`` what was read, in ``reset`` what is new,
          in ``dropped`` what the checkpoint has besides.

        Raises:
          FileNotFoundError: as `restore`.
          TypeError: ``dtype`` is not floating.
          ValueError: as `restore`; a leaf does not fit; a value does not fit into its dtype; no averages were saved.
        """
        if like is None and (partial or rename is not None):
            name = "partial=True" if partial else f"rename={rename!r}"
            raise ValueError(f"{name}: it needs like. Use the tree or the model to fill as like")
        if is_module(like) and part != "params":
            raise ValueError(f"part={part!r}: an nnx.Module takes its own parts. Leave part out")
        if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"dtype={dtype!r}: a floating dtype is needed. Use jnp.bfloat16, for example")
        if self._writer is not None:
            self.wait()

        def read(path: pathlib.Path, about: dict[str, Any]) -> Restored:
            table = about["leaves"]
            if like is None:
                shapes = {
                    name: _shape(row) for name, row in table.items() if name == part or name.startswith(f"{part}/")
                }
                if not shapes:
                    parts = sorted({name.partition("/")[0] for name in table})
                    raise ValueError(f"part={part!r}: {path} has no such part. Use one of {parts}")
                leaves, back = shapes, functools.partial(nested, part=part)
            else:
                leaves, back = open_tree(like, part)
            filling = Filling(table, leaves, rename)
            filling.check(leaves, partial, str(path), nearest_in=table)
            averages = about.get("averages", {}) if averaged else {}
            if averaged and not averages:
                raise ValueError(f"averaged=True: {path} has no averaged weights. Use averaged=False")
            likes = {} if like is None else {source: leaves[name] for name, source in filling.sources.items()}
            values = _read_some(path, table, [*filling.sources.values()], likes, averages)
            new, report = fill(filling, leaves, {n: values[source] for n, source in filling.sources.items()}, dtype)
            tree = back(new)
            return Restored(tree, about["data"], about["step"], report)

        return self._reading(step, read)

    def _reading(self, step: int | None, read: Callable[[pathlib.Path, dict[str, Any]], Any]) -> Any:
        """``read`` of the checkpoint to take. A run that saves beside may delete it meanwhile: then of a newer one."""
        while True:
            path = self.directory / _from_process_0(lambda: str(self._choose(step).relative_to(self.directory)))
            try:
                with contextlib.closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler())) as reader:
                    about = reader.restore(path, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
                return read(path, about)
            except Exception:
                if inspect(path).files is not None or jax.process_count() > 1:
                    raise

    def _read_all(
        self, leaves: dict[str, Any], migrate: bool, path: pathlib.Path, about: dict[str, Any]
    ) -> tuple[dict, dict, dict]:
        """``table, about, leaves by name`` of a checkpoint for a state with ``leaves``."""
        table = about["leaves"]
        moved = {name for name in {**table, **leaves} if migrate and name.startswith("opt_state/")}
        differences = compare(table, leaves, without=moved)
        if differences:
            hint = "after an edit of the optimizer: restore(..., migrate=True)"
            hint = "only opt_state may differ with migrate=True" if migrate else hint
            raise ValueError("\n".join([f"{path}: the checkpoint of another model", *differences, hint]))
        likes = {name: leaf for name, leaf in leaves.items() if name not in moved}
        return table, about, _read_some(path, table, [*table], likes)

    def _choose(self, step: int | None) -> pathlib.Path:
        """The newest good checkpoint, of ``step`` if given."""
        found = find(self.directory)
        try:
            return self._choose_of(found, step)
        except (FileNotFoundError, ValueError):
            again = find(self.directory)
            if [each.path for each in again] == [each.path for each in found]:
                raise
            return self._choose_of(again, step)  # a run that saves beside went on meanwhile

    def _choose_of(self, found: list[Found], step: int | None) -> pathlib.Path:
        if not found or step not in (None, *(each.step for each in found)):
            there = f"there are {self.saved}" if found else "nothing was saved yet (Checkpoints.latest is None)"
            wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
            raise FileNotFoundError(f"{self.directory}: no {wanted}; {there}")
        faults = []
        for each in found:
            if step not in (None, each.step):
                continue
            fault = each.fault or damage(each)
            if fault is None:
                for told in faults:
                    warnings.warn(f"{told}; passed over for that of step {each.step}", RuntimeWarning, stacklevel=7)
                return each.path
            self._bad.add((each.path, each.serial))
            faults.append(f"{each.path}: {fault}")
        raise ValueError(f"{self.directory}: no good checkpoint: " + "; ".join(faults))

    def _must_leave(self, step: int) -> bool:
        return self._terminated or (jax.process_count() > 1 and _told_to_stop_at(step))

    def _complete(self, step: int) -> None:
        """In the background: wait for Orbax, write the manifest, delete what is older than the newest few."""
        peers = self._peers
        assert peers is not None
        try:
            if self._error is not None:
                raise self._error
            self._writer.wait_until_finished()  # type: ignore[union-attr]
            if jax.process_index() == 0:
                assert self._lock is not None
                self._lock.check()
                serials = [each.serial for each in find(self.directory) if each.files is not None]
                seal(self.directory / str(step), step, int(max(serials, default=0)) + 1, self._metric)
                for each in self._retention.doomed(find(self.directory), self._bad):
                    remove(self.directory, each)
            peers.gather("sealed", "", alert=True)
        except BaseException as error:
            self._error = error
            if peers.count > 1:
                with contextlib.suppress(Exception):
                    self._leave_together(peers, error)

    def _leave_together(self, peers: Peers, error: BaseException) -> None:
        """Agree on the next call of `after` that no process has made yet: a process that raised alone would leave the
        others in a collective."""
        peers.fail(_line(error))
        with self._turn:
            self._failing, calls = True, self._calls
        self._last_call = calls + 1
        self._last_call = 1 + max(map(int, peers.gather("calls", str(calls), TOGETHER)))

    def _make_room(self, step: int) -> None:
        """Clear what killed or failed saves left, and the place of a new checkpoint."""
        clear_partial(self.directory)
        place = inspect(self.directory / str(step))
        if place.files is None:
            remove(self.directory, place)
        else:
            aside = self.directory / ASIDE / str(step)
            remove(self.directory, inspect(aside))
            aside.parent.mkdir(exist_ok=True)
            place.path.rename(aside)

    def _recover(self) -> None:
        """After a failed save: a new Orbax manager, and its files removed."""
        with contextlib.suppress(Exception):
            self._writer.close()  # type: ignore[union-attr]
        self._writer = _checkpointer(self._peers)
        if self._lock is not None and self._lock.is_mine:  # what is there may be a save of the run that took it
            clear_partial(self.directory)
            place = inspect(self.directory / str(self._saving))
            if place.files is None:
                shutil.rmtree(place.path, ignore_errors=True)

    def _failure(self, why: str) -> str:
        left = f"left: the checkpoints of the steps {self.saved}" if self.saved else "no checkpoint is left"
        return f"{self.directory}: the checkpoint of step {self._saving} was not saved ({why}); {left}"


def _checkpointer(peers: Peers | None = None) -> ocp.AsyncCheckpointer:
    """The part of Orbax below its manager, which would delete, and ask about preemption, by rules of its own."""
    options = ocp.options.AsyncOptions(barrier_sync_fn=None if peers is None else peers.barrier)
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)


def _on_sigterm(checkpoints: weakref.ref[Checkpoints], before: Any) -> Callable[[int, Any], None]:
    """A handler that does not hold the object: when that goes, its lock must go with it."""

    def handle(number: int, frame: Any) -> None:
        there = checkpoints()
        if there is not None:
            there._terminated = True
            return
        signal.signal(number, before or signal.SIG_DFL)
        signal.raise_signal(number)

    return handle


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _read_some(
    path: pathlib.Path,
    table: dict[str, dict],
    names: Sequence[str],
    likes: dict[str, Any],
    averages: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """The leaves ``names`` of a checkpoint, each as and where its namesake in ``likes`` is; nothing else is read.

    Of a leaf in ``averages``, the average in its place.
    """
    likes = dict(likes)
    twins = {name: averages[name] for name in names if averages and name in averages}
    for name, (first, *_) in twins.items():
        if name in likes:
            likes[first] = likes[name]
    wanted = {name: table[name] for name in table if name in {*names, *(x for twin in twins.values() for x in twin)}}
    item = targets(wanted, likes)
    arrays: dict[str, Any] = {}
    if item:
        how = ocp.checkpoint_utils.construct_restore_args(item)
        args = ocp.args.PyTreeRestore(item, restore_args=how, partial_restore=True)
        with contextlib.closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler())) as reader:
            arrays = reader.restore(path, args=ocp.args.Composite(state=args))["state"]
    out = unpack(wanted, arrays, likes)
    return out | {name: average_of(out[name], *(out[x] for x in twin)) for name, twin in twins.items()}


def _shape(row: dict[str, Any]) -> Any:
    dtype = jax.random.key(0, impl=row["impl"]).dtype if row["impl"] is not None else jnp.dtype(row["dtype"])
    return jax.ShapeDtypeStruct(tuple(row["shape"]), dtype)


def _fresh(like: Any, read: dict[str, Any], tx: Any) -> Any:
    """The optimizer state to migrate into: that of ``like``, or made by ``tx`` where ``like`` has only shapes.

    Raises:
      ValueError: there are only shapes, and no ``tx``, or one of another structure.
    """
    shapes = jax.tree.leaves(like.opt_state)
    if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in shapes):
        return like.opt_state
    if tx is None:
        raise ValueError(
            "migrate=True: like has only shapes in opt_state, and leaves that the checkpoint lacks need values. "
            "Use tx=, the new optimizer, or a state as like"
        )
    names = [name for name in named_leaves(like, "like") if name == "params" or name.startswith("params/")]
    params = jax.tree.unflatten(jax.tree.structure(like.params), [read[name] for name in names])
    expected = jax.eval_shape(tx.init, params)
    if jax.tree.structure(expected) != jax.tree.structure(like.opt_state):
        raise ValueError("tx: it has another state than like.opt_state. Use the optimizer that like was made for")
    where = jax.tree.map(lambda leaf: leaf.sharding, like.opt_state)
    return jax.jit(tx.init, out_shardings=where)(params)


def _told_to_stop_at(step: int) -> bool:
    """Whether several processes agreed to stop after ``step``: one more than the latest that any of them had asked for
    when one was told to terminate, and 1 if none had asked."""
    served = getattr(jax.config, "jax_enable_preemption_service", True)
    return served and multihost_utils.reached_preemption_sync_point(step)


def _from_process_0(find_out: Callable[[], str]) -> str:
    """What the first process finds out, or the exception it raises, on all of them."""
    if jax.process_count() == 1:
        return find_out()
    failure, answer, room = None, ["", ""], np.zeros(4096, np.uint8)
    if jax.process_index() == 0:
        try:
            answer[1] = find_out()
        except (OSError, ValueError) as error:
            failure, answer = error, [type(error).__name__, str(error)[:2000]]
        text = np.frombuffer(json.dumps(answer).encode()[: room.size], np.uint8)
        room[: text.size] = text
    kind, text = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(room))).rstrip(b"\0"))
    if kind:
        raise failure or (FileNotFoundError(text) if kind == "FileNotFoundError" else ValueError(text))
    return text
