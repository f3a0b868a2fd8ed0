"""Checkpoints: a run on disk, so that one that was killed goes on as if it had not been.

The only import of orbax.checkpoint, which writes and reads the arrays. Added here: checksums, when a checkpoint counts
as saved, which may be deleted, dtypes, SIGTERM.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import signal
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxsgd.checkpoint.leaves import compare, pack, put, targets, unpack
from jaxsgd.checkpoint.lock import DirectoryInUse, Lock
from jaxsgd.checkpoint.manifest import ASIDE, clear_partial, damage, find, inspect, remove, seal
from jaxsgd.checkpoint.peers import Peers
from jaxsgd.paths import named_leaves

__all__ = ["Checkpoints", "DirectoryInUse", "Restored"]

TOGETHER = 30.0
"""Seconds that the processes of a run have to agree on where to stop after a save failed on one."""


class Restored(NamedTuple):
    """What `Checkpoints.restore` found.

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
    is killed before that goes on from the one before. All saves of a run must happen inside ``with``; several
    processes call every method together. ``directory`` must be one that all processes see.

    Inside ``with`` the run holds the lock of the directory: another run is refused. A lock is given back at the end of
    ``with``, when the object goes, and when its process dies. Outside ``with`` nothing is locked: `restore`, `saved`
    and `latest` work beside a run that saves.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 3, every: int = 1000) -> None:
        """
        Args:
          directory: made if missing.
          keep: how many checkpoints remain; an older one is deleted after the newer one is saved, never before.
          every: steps from one checkpoint to the next (see `after`).

        Raises:
          ValueError: ``keep`` or ``every`` below 1, or ``directory`` is no path of a mounted file system.
          NotADirectoryError: ``directory`` is a file.
          OSError: it cannot be made.
        """
        for name, value in {"keep": keep, "every": every}.items():
            if value < 1:
                raise ValueError(f"{name}={value}: it must be 1 or more")
        if "://" in os.fspath(directory):
            raise ValueError(f"directory={os.fspath(directory)!r}: give the path where that storage is mounted")
        self.directory = pathlib.Path(directory).absolute()
        self.keep, self.every = keep, every
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise NotADirectoryError(f"directory={str(directory)!r}: {error.filename!r} is a file") from None
        except OSError as error:
            raise type(error)(f"directory={str(directory)!r}: it cannot be made: {error}") from None
        self._writer: ocp.AsyncCheckpointer | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saving = -1
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
        """The steps whose checkpoints are complete on the disk, oldest first. What a step in here names survives a
        kill; whether its files still are what they were, `restore` checks."""
        return list(dict.fromkeys(each.step for each in find(self.directory) if each.files is not None))[::-1]

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, None where there is none."""
        return (self.saved or [None])[-1]

    def after(self, step: int, state: Any, *, data: Any = None) -> None:
        """To be called after each step: saves every ``every`` steps; after a SIGTERM saves at once and leaves.

        Args:
          step: completed steps, counted on the host, so that nothing waits for the device. Several processes stop
            together only if each calls this after every step.
          state, data: see `save`.

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
                self.save(state, data=data, step=step, wait=True)
            raise SystemExit(143)
        if step % self.every == 0:
            self.save(state, data=data, step=step)
        elif jax.process_count() == 1 and self._thread is not None and not self._thread.is_alive():
            self.wait()

    def save(self, state: Any, *, data: Any = None, step: int | None = None, wait: bool = False) -> None:
        """Save in the background; the state may be donated to the next step at once.

        A checkpoint of the same step is replaced, and is there until the new one is complete.

        Args:
          state: any tree of arrays, typed PRNG keys included, usually a `jaxsgd.TrainState`.
          data: the position in the data: what JSON can hold, of several processes that of the first.
          step: completed steps, by default ``state.step``.
          wait: return when it is complete on the disk.

        Raises:
          RuntimeError: outside ``with``, or the state was donated to a step.
          TypeError, ValueError: a leaf that is no array, two leaves of one name, no ``step``, ``data`` is not JSON.
          OSError: this save, or the one before, failed, on any process. What was saved before remains.
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
        self.wait()
        self._saving = step
        assert self._peers is not None
        table, arrays = pack(named_leaves(state, "state"))
        about = {"step": step, "data": data, "leaves": table}
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
          OSError: it failed; says why, and what is left. The next save starts afresh.
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
          migrate: take ``opt_state`` over by name where the optimizer was edited, and leave the rest of it as it is in
            ``like``, which must then be a state. See `jaxsgd.migration`.
          tx, old_tx: with ``migrate``, the new optimizer and the one that was saved, for storages of your own. Default:
            unknown.

        Returns:
          `Restored`.

        Raises:
          FileNotFoundError: there is no checkpoint, or not that of ``step``.
          ValueError: no checkpoint is good (says what is wrong with each), or it is that of another model (says
            which paths differ), or ``migrate`` with a ``like`` that is no such state.
        """
        if self._writer is not None:
            self.wait()
        leaves = named_leaves(like, "like")
        if migrate and not (hasattr(like, "opt_state") and hasattr(like, "params")):
            raise ValueError(f"migrate=True: like is a {type(like).__name__} without opt_state and params")
        path = self.directory / _from_process_0(lambda: str(self._choose(step).relative_to(self.directory)))
        with contextlib.ExitStack() as stack:
            reader = self._writer or stack.enter_context(contextlib.closing(_checkpointer()))
            about = reader.restore(path, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
            table = about["leaves"]
            moved = {name for name in {**table, **leaves} if migrate and name.startswith("opt_state/")}
            differences = compare(table, leaves, without=moved)
            if differences:
                hint = "after an edit of the optimizer: restore(..., migrate=True)"
                hint = "only opt_state may differ with migrate=True" if migrate else hint
                raise ValueError("\n".join([f"{path}: the checkpoint of another model", *differences, hint]))
            likes = {name: leaf for name, leaf in leaves.items() if name not in moved}
            items = ocp.args.Composite(state=ocp.args.StandardRestore(targets(table, likes)))
            read = unpack(table, reader.restore(path, args=items)["state"], likes)
        report = None
        if migrate:
            from jaxsgd.migration import adopt

            old = {name.removeprefix("opt_state/"): read.pop(name) for name in table if name in moved}
            adopted, report = adopt(old, like.opt_state, like.params, tx=tx, old_tx=old_tx)
            names = {"opt_state/" + name: leaf for name, leaf in named_leaves(adopted, "opt_state").items()}
            read |= {name: put(leaf, leaves[name]) for name, leaf in names.items()}
        state = jax.tree.unflatten(jax.tree.structure(like), [read[name] for name in leaves])
        if self._writer is not None and jax.process_count() > 1:
            # A step that a resumed run never takes; and from now on they agree on one after that restored.
            self._terminated = _told_to_stop_at(1)
            _told_to_stop_at(about["step"])
        return Restored(state, about["data"], about["step"], report)

    def _choose(self, step: int | None) -> pathlib.Path:
        """The newest good checkpoint, of ``step`` if given."""
        found = find(self.directory)
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
                    warnings.warn(f"{told}; passed over for that of step {each.step}", RuntimeWarning, stacklevel=5)
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
                serials = [each.serial for each in find(self.directory) if each.files is not None]
                seal(self.directory / str(step), step, int(max(serials, default=0)) + 1)
                kept: set[int] = set()
                for each in find(self.directory):
                    if each.files is None:
                        continue
                    if len(kept) == self.keep or each.step in kept:
                        remove(self.directory, each)
                    elif (each.path, each.serial) not in self._bad:
                        kept.add(each.step)
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
        """After a failed save: an Orbax that knows nothing of it, and its files gone."""
        with contextlib.suppress(Exception):
            self._writer.close()  # type: ignore[union-attr]
        self._writer = _checkpointer(self._peers)
        if jax.process_index() == 0:
            clear_partial(self.directory)
            place = inspect(self.directory / str(self._saving))
            if place.files is None:
                shutil.rmtree(place.path, ignore_errors=True)

    def _failure(self, why: str) -> str:
        left = f"what is left: the checkpoints of the steps {self.saved}" if self.saved else "no checkpoint is left"
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
