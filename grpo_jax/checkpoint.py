"""Checkpoints: one atomic Orbax record a step holds everything a run needs to go on as if it had not stopped.

A step is saved in this order: Orbax writes it under another name and renames it; every host hashes its share of the
files; the first process writes the manifest; older steps are deleted. A kill at any moment leaves a sound step.
"""

import json
import re
import shutil
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from grpo_jax import manifest
from grpo_jax.manifest import NoManifestError
from grpo_jax.mesh import is_first, text_of_first, texts_of_all, wait_for_all
from grpo_jax.types import Params, TrainState

DELETED, DAMAGED = ".deleted", ".damaged"
"""What follows the name of a directory that is being deleted, or that is kept to be looked at and never read."""


@dataclass(frozen=True)
class Found:
    """Where a run can go on from.

    Attributes:
        step: of the newest sound checkpoint; None where there is none at all.
        passed_over: newer steps, and what is wrong with each.
        verified: whether its files are known to be those that were written.
    """

    step: int | None = None
    passed_over: Mapping[int, str] = field(default_factory=dict)
    verified: bool = True

    def lines(self) -> list[str]:
        """What to warn of."""
        lines = [
            f"the checkpoint of step {step} {'was not finished' if wrong == manifest.ABSENT else 'is damaged'} "
            f"({wrong}): that of step {self.step} is taken"
            for step, wrong in self.passed_over.items()
        ]
        if not self.verified:
            lines.append(
                f"the checkpoint of step {self.step} {manifest.ABSENT}, as older versions wrote none: it is taken, and "
                "nobody knows whether its files are whole"
            )
        return lines


class CheckpointStore:
    """The checkpoints of one run directory: ``checkpoints/<step>`` and, with a KL, ``reference``."""

    def __init__(self, run_dir: Path, keep: int | None):
        """Open the store, and create it where missing; ``keep`` checkpoints are kept, all if None."""
        self._root, self._reference = (run_dir / "checkpoints").resolve(), (run_dir / "reference").resolve()
        self._root.mkdir(parents=True, exist_ok=True)
        self._keep = keep
        self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._finisher: threading.Thread | None = None
        self._failed: list[BaseException] = []

    def steps(self) -> list[int]:
        """Steps that Orbax has completed, ascending; nobody has looked at what is in them."""
        return sorted(int(place.name) for place in self._root.iterdir() if re.fullmatch(r"0|[1-9]\d*", place.name))

    def latest(self) -> int | None:
        """The newest of `steps`."""
        return max(self.steps(), default=None)

    def newest_sound(self) -> Found:
        """The newest step whose files are those that were written; the same on every host.

        A step without a manifest counts where no other is left: older versions wrote none.

        Raises:
            ValueError: every step is damaged.
        """
        faults: dict[int, str] = {}
        steps = json.loads(text_of_first("steps", json.dumps(self.steps())))
        for step in reversed(steps):
            wrong = self.fault(step)
            if wrong is None:
                return Found(step, faults)
            faults[step] = wrong
        for step, wrong in faults.items():
            if wrong == manifest.ABSENT:
                return Found(step, {k: v for k, v in faults.items() if k > step}, verified=False)
        if faults:
            listed = "; ".join(f"step {step}: {wrong}" for step, wrong in faults.items())
            raise ValueError(
                f"output_dir: no checkpoint in {self._root} is whole ({listed}), so there is nothing to go on from, "
                "and nothing was changed; put back a copy of one, or name another output_dir"
            )
        return Found()

    def fault(self, step: int) -> str | None:
        """What is wrong with the files of a step, in words; None where they are those that were written."""
        return _fault(self._root / str(step), str(step))

    def set_aside(self, steps: Iterable[int]) -> None:
        """Rename steps that are not to be used, so that they can be saved again."""
        if is_first():
            for step in steps:
                _rename_free(self._root / str(step), DAMAGED)
        wait_for_all("checkpoints set aside")

    def tidy(self) -> None:
        """Remove what an earlier process of the run had not finished writing or deleting."""
        if is_first():
            for pattern in (".orbax-checkpoint-tmp*", f"{DELETED}*"):
                own = (
                    *self._root.glob(f"*{pattern}"),
                    *self._reference.parent.glob(f"{self._reference.name}{pattern}"),
                )
                for left in own:
                    shutil.rmtree(left, ignore_errors=True)
        wait_for_all("checkpoints tidied")

    def save(self, step: int, state: TrainState, record: dict[str, Any]) -> None:
        """Write in the background; arrays and record are copied before this returns, so that they may change.

        Args:
            step: rollouts trained on.
            state: parameters, optimizer and update count.
            record: what else the run needs, JSON values only.
        """
        self.wait()
        # On a CPU the host's copy of an array is the array's own memory, which the next update may overwrite. Elsewhere
        # Orbax has brought all to the host when its save returns, and a copy on the device could be what does not fit.
        if jax.default_backend() == "cpu":
            state = jax.tree.map(lambda x: x.copy(), state)
        record = json.loads(json.dumps(record))
        items = {"state": ocp.args.StandardSave(_plain(state)), "record": ocp.args.JsonSave(record)}
        self._writer.save(self._root / str(step), ocp.args.Composite(**items))
        self._finisher = threading.Thread(target=self._finish, args=(step,), daemon=True)
        self._finisher.start()

    def restore(self, step: int, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Read a checkpoint into the shapes, dtypes and shardings of ``target``."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target)
        items = {"state": ocp.args.StandardRestore(_plain(abstract)), "record": ocp.args.JsonRestore()}
        restored = self._writer.restore(self._root / str(step), ocp.args.Composite(**items))
        leaves = jax.tree.leaves(restored["state"])
        return jax.tree.unflatten(jax.tree.structure(target), leaves), restored["record"]

    def restore_record(self, step: int) -> dict[str, Any]:
        """Read what a checkpoint holds besides arrays."""
        arguments = ocp.args.Composite(record=ocp.args.JsonRestore())
        return self._writer.restore(self._root / str(step), arguments)["record"]

    def restore_params(self, step: int, target: Params) -> Params:
        """Read the policy alone, into the shapes, dtypes and shardings of ``target``; its leaves may be abstract."""
        nothing: Any = None
        abstract = _plain(TrainState(target, nothing, nothing))  # under the names that the whole state has
        arguments = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype), abstract)
        item = ocp.args.PyTreeRestore(abstract, arguments, partial_restore=True)
        restored = self._writer.restore(self._root / str(step), ocp.args.Composite(state=item))
        return jax.tree.unflatten(jax.tree.structure(target), jax.tree.leaves(restored["state"]))

    def save_reference(self, params: Params) -> None:
        """Keep the parameters that a run starts from, in place of those of an earlier start."""
        if is_first():
            _delete(self._reference)
        wait_for_all("reference deleted")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(self._reference, _plain(params))
        _seal(self._reference, "reference")
        wait_for_all("reference sealed")

    def check_reference(self) -> tuple[str, ...]:
        """Lines to warn of; none where the files of the reference are those that were written.

        Raises:
            ValueError: they are others.
        """
        wrong = _fault(self._reference, "reference") if self._reference.is_dir() else "it is missing"
        if wrong == manifest.ABSENT:
            return (f"{self._reference} {wrong}, as older versions wrote none: nobody knows whether it is whole",)
        if wrong is not None:
            raise ValueError(
                f"output_dir: the parameters that the run started from, {self._reference}, are damaged ({wrong}), and "
                "a run cannot go on from others; put back a copy of that directory, or name another output_dir"
            )
        return ()

    def restore_reference(self, target: Params) -> Params:
        """The parameters the run started from."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target)
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(self._reference, _plain(abstract))
        return jax.tree.unflatten(jax.tree.structure(target), jax.tree.leaves(restored))

    def wait(self) -> None:
        """Until what is being written is written.

        Raises:
            Exception: what writing ended with.
        """
        if self._finisher is not None:
            self._finisher.join()
            self._finisher = None
        if self._failed:
            raise self._failed.pop()

    def settle(self, seconds: float) -> None:
        """Wait so long, at most, for what is being written; what became of it is not said."""
        if self._finisher is not None:
            self._finisher.join(seconds)

    def close(self) -> None:
        """Wait for what is being written."""
        try:
            self.wait()
        finally:
            self._writer.close()

    def _finish(self, step: int) -> None:
        """What follows the copy of the arrays, in a thread of its own."""
        try:
            self._writer.wait_until_finished()
            _seal(self._root / str(step), str(step))
            if is_first() and self._keep is not None:
                for old in self.steps()[: -self._keep]:
                    _delete(self._root / str(old))
        except BaseException as error:
            self._failed.append(error)


def _seal(place: Path, label: str) -> None:
    """Write the manifest from what each host has read of its share of the files; the first process writes it."""
    mine = manifest.digests(place, jax.process_index(), jax.process_count())
    parts = texts_of_all("digests", json.dumps(mine))
    if parts is not None:
        manifest.seal(place, label, {name: digest for part in parts for name, digest in json.loads(part).items()})


def _fault(place: Path, label: str) -> str | None:
    """What is wrong by what any host has seen in its share of the files, told to all by the first."""
    try:
        mine = manifest.fault(place, label, jax.process_index(), jax.process_count())
    except NoManifestError:
        mine = manifest.ABSENT
    seen = texts_of_all("faults", mine or "") or []
    return text_of_first("fault", next((wrong for wrong in seen if wrong), "")) or None


def _delete(place: Path) -> None:
    """Delete a directory, whole or not at all to whoever looks for it by its name."""
    if place.exists():
        shutil.rmtree(_rename_free(place, DELETED), ignore_errors=True)


def _rename_free(place: Path, suffix: str) -> Path:
    """Rename to a name with a suffix that nothing has yet; the new place."""
    names = (place.with_name(f"{place.name}{suffix}{f'-{taken}' if taken else ''}") for taken in count())
    return place.rename(next(name for name in names if not name.exists()))


def _plain(tree: Any) -> dict[str, Any]:
    """A tree of any node types as a flat dict whose keys sort in the order of its leaves."""
    return {f"{i:05d}{jax.tree_util.keystr(path)}": leaf for i, (path, leaf) in enumerate(_leaves(tree))}


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]
