"""Package versions and the device: recorded, and said once where they are others than before."""

from collections.abc import Callable

from grpo_jax.callbacks import Callback, Run
from grpo_jax.preflight import versions
from grpo_jax.rundir import note_environment


class Environment(Callback):
    """Keeps environment.json: on what the steps from each start on were computed."""

    def __init__(self, warn: Callable[[str], None]):
        """``warn`` is told what changed."""
        self._warn = warn

    def on_start(self, run: Run) -> None:
        """Compare with the last start of this run."""
        changed = note_environment(run.directory, run.start, versions())
        if changed:
            self._warn(
                f"this run goes on with other packages or devices ({'; '.join(changed)}): its numbers may differ in "
                "the last digits from those of a run that did not change. Nothing is to be done; environment.json "
                "keeps both."
            )
