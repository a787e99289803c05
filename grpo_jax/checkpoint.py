"""Checkpoints: one atomic Orbax record a step holds everything a run needs to go on as if it had not stopped."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from grpo_jax.types import Params, TrainState


class CheckpointStore:
    """The checkpoints of one run directory: ``checkpoints/<step>`` and, with a KL, ``reference``.

    A checkpoint appears under its name only when it is complete, so a kill at any moment leaves the one before.
    """

    def __init__(self, run_dir: Path, keep: int | None):
        """Open (and create, where missing) the store; ``keep`` checkpoints are kept, all if None."""
        self._reference = (run_dir / "reference").resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager((run_dir / "checkpoints").resolve(), options=options)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, record: dict[str, Any]) -> None:
        """Write in the background; the arrays are copied before this returns, so they may be donated.

        Args:
            step: rollouts trained on.
            state: parameters, optimizer and update count.
            record: what else the run needs, JSON values only.
        """
        # On CPU the host copy of an array is the array's own memory, which the next update may overwrite.
        state = jax.tree.map(lambda x: x.copy(), state)
        items = {"state": ocp.args.StandardSave(_plain(state)), "record": ocp.args.JsonSave(record)}
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, step: int, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Read a checkpoint into the shapes, dtypes and shardings of ``target``."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target)
        items = {"state": ocp.args.StandardRestore(_plain(abstract)), "record": ocp.args.JsonRestore()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        leaves = jax.tree.leaves(restored["state"])
        return jax.tree.unflatten(jax.tree.structure(target), leaves), restored["record"]

    def restore_params(self, step: int, target: Params) -> Params:
        """Read the policy alone, into the shapes, dtypes and shardings of ``target``; its leaves may be abstract."""
        nothing: Any = None
        abstract = _plain(TrainState(target, nothing, nothing))  # under the names that the whole state has
        arguments = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype), abstract)
        item = ocp.args.PyTreeRestore(abstract, arguments, partial_restore=True)
        restored = self._manager.restore(step, args=ocp.args.Composite(state=item))
        return jax.tree.unflatten(jax.tree.structure(target), jax.tree.leaves(restored["state"]))

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save_reference(self, params: Params) -> None:
        """Keep the parameters the run started from, unless they are there already."""
        if not self._reference.exists():
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(self._reference, _plain(params))

    def restore_reference(self, target: Params) -> Params:
        """The parameters the run started from."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target)
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(self._reference, _plain(abstract))
        return jax.tree.unflatten(jax.tree.structure(target), jax.tree.leaves(restored))

    def wait(self) -> None:
        """Until what is being written is written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _plain(tree: Any) -> dict[str, Any]:
    """A tree of any node types as a flat dict whose keys sort in the order of its leaves."""
    return {f"{i:05d}{jax.tree_util.keystr(path)}": leaf for i, (path, leaf) in enumerate(_leaves(tree))}


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]
