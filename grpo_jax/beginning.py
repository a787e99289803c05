"""Where a run begins: from the newest sound checkpoint, or from the model."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_jax import inputs, rundir
from grpo_jax.checkpoint import CheckpointStore, Found
from grpo_jax.collect import Collector
from grpo_jax.learner.learning import Learning
from grpo_jax.mesh import is_first, same_everywhere
from grpo_jax.metrics import JsonLines, read_json_lines

MOST_LINES = 6
"""Numbers of damaged lines that a warning lists."""


@dataclass
class Beginning:
    """What a run has when it begins.

    Attributes:
        record: the rest of its checkpoint, or of a new run.
        resumed: whether there is a checkpoint.
        warnings: lines to warn of.
    """

    record: dict[str, Any] = field(default_factory=lambda: {"step": 0, "seconds": 0.0, "phases": {}, "accuracy": []})
    resumed: bool = False
    warnings: list[str] = field(default_factory=list)


def begin(store: CheckpointStore, learning: Learning, collector: Collector, given: Mapping[str, str]) -> Beginning:
    """Bring everything to where the run goes on; the same on every host.

    Args:
        store: of the run's directory.
        learning: that has loaded the model.
        collector: that stands before the first prompt.
        given: digests of the run's inputs.

    Raises:
        ValueError: what is there is damaged, or the run was given other inputs so far.
    """
    common = {name: digest for name, digest in given.items() if not name.startswith(inputs.MAY_CHANGE)}
    same_everywhere("the inputs of the run", common)
    store.tidy()
    found = store.newest_sound()
    beginning = Beginning(warnings=found.lines())
    if found.step is None:
        learning.keep_reference(store)
    else:
        _go_on(store, learning, collector, given, found, beginning)
    beginning.record["inputs"] = dict(given)
    return beginning


def open_lines(directory: Path, beginning: Beginning) -> tuple[JsonLines, JsonLines, tuple[Mapping[str, Any], ...]]:
    """The files of metrics and completions, cut back to where the run begins, and the rows of metrics so far."""
    below = beginning.record["step"] + 1 if beginning.resumed else None
    if not is_first():
        return JsonLines(Path(os.devnull)), JsonLines(Path(os.devnull)), ()
    metrics, completions = directory / rundir.METRICS, directory / rundir.COMPLETIONS
    files = JsonLines(metrics, below), JsonLines(completions, below)
    for path, lines in zip((metrics, completions), files, strict=True):
        if lines.damaged:
            numbers = ", ".join(map(str, lines.damaged[:MOST_LINES]))
            more = f" and {len(lines.damaged) - MOST_LINES} more" if len(lines.damaged) > MOST_LINES else ""
            beginning.warnings.append(f"{path}: line {numbers}{more} cannot be read, and is now in {path}.damaged")
    return *files, tuple(read_json_lines(metrics)) if beginning.resumed else ()


def _go_on(
    store: CheckpointStore,
    learning: Learning,
    collector: Collector,
    given: Mapping[str, str],
    found: Found,
    beginning: Beginning,
) -> None:
    """From a checkpoint; what is newer and not sound is put aside, so that its step can be saved again."""
    assert found.step is not None
    beginning.warnings += inputs.compare(store.restore_record(found.step).get("inputs", {}), given)
    beginning.warnings += learning.check_reference(store)
    beginning.record, beginning.resumed = learning.restore(store, found.step), True
    collector.restore(beginning.record["collector"])
    store.set_aside(found.passed_over)
