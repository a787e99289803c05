"""The directory of a run: what is in it, whether a config may go on in it, what is safe after an error.

Where a run starts: (1) the directory holds a checkpoint of the same config: go on from the newest; (2) it holds one
of another config, or other files: refuse and show the difference; (3) it is empty or new, or its run ended before it
had sampled anything (a path was wrong, say): start from the model.
"""

import datetime
import errno
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_jax.config import LogConfig, TrainConfig

CONFIG, SUMMARY, METRICS, COMPLETIONS = "config.toml", "summary.json", "metrics.jsonl", "completions.jsonl"
CHECKPOINTS, ENVIRONMENT, DECIDED = "checkpoints", "environment.json", "decided.json"
EPOCH = datetime.datetime(2000, 1, 1)
"""From which times are counted, so that they are numbers of 32 bits."""
BEGAN = "began, seconds since 2000"
"""The entry of what was decided that tells chat templates the time, however long the run goes on."""
MAY_DIFFER = frozenset(
    {"output_dir", "compilation_cache", "mesh.coordinator", "mesh.process_id", "mesh.platform"}
    | {f"log.{name}" for name in LogConfig.model_fields}
)
"""Fields that change nothing a run computes, so that it may go on with others."""
MOST_SHOWN = 6
"""Differences listed in an error."""
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Error numbers of a write for which there is no room."""


def open_run(config: TrainConfig, name: str) -> Path:
    """Create or re-open the run's directory and write its config.

    Args:
        config: resolved.
        name: what a directory of our own choice is called after.

    Raises:
        ValueError: the directory holds a run of another config, or files that are no run.
    """
    directory = Path(config.output_dir) if config.output_dir else _fresh(name)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"output_dir: {directory} is a file, but a run needs a directory; name another place")
    recorded = directory / CONFIG
    if recorded.exists():
        different = differences(_read_back(recorded), config)
        if different and (directory / METRICS).exists():
            more = f" and {len(different) - MOST_SHOWN} more" if len(different) > MOST_SHOWN else ""
            raise ValueError(
                f"output_dir: {directory} holds a run of another config ({'; '.join(different[:MOST_SHOWN])}{more}); "
                "nothing was changed; give the recorded values to go on, or another output_dir"
            )
        if not different and _read_back(recorded).steps == config.steps:
            return directory
    elif directory.exists() and any(directory.iterdir()):
        raise ValueError(
            f"output_dir: {directory} holds files and no {CONFIG}, so it is no run, and nothing was changed; "
            "name an empty or new directory"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(recorded, config.to_toml())
    except OSError as error:
        if error.errno in FULL:
            raise
        why = f"{error.strerror}: {error.filename}"
        raise ValueError(f"output_dir: {directory} cannot be written to ({why}); name another place") from error
    return directory


def differences(recorded: TrainConfig, asked: TrainConfig) -> list[str]:
    """Fields in which two configs differ, as "path: recorded -> asked", but for those in which a run may.

    A run may be made longer where its learning rates do not depend on its length.
    """
    old, new = _flat(recorded.model_dump()), _flat(asked.model_dump())
    may = MAY_DIFFER
    if asked.steps > recorded.steps and asked.optim.schedule == asked.critic.schedule == "constant":
        may = may | {"steps"}
    changed = [k for k in {**old, **new} if old.get(k) != new.get(k) and k not in may]
    return [f"{k}: {old.get(k, 'not there')!r} -> {new.get(k, 'not there')!r}" for k in changed]


def newest_checkpoint(directory: Path) -> int | None:
    """Step of the newest complete checkpoint; one that is being written has no number for its name yet."""
    steps = [int(place.name) for place in (directory / CHECKPOINTS).glob("*") if place.name.isdecimal()]
    return max(steps, default=None)


def what_is_safe(directory: Path) -> str | None:
    """What an error left of a run, in words; None where it had trained on nothing."""
    metrics, step = directory / METRICS, newest_checkpoint(directory)
    if step is None:
        written = metrics.is_file() and metrics.stat().st_size > 0
        return f"the record is safe in {directory}; there is no checkpoint yet" if written else None
    return f"the record and the checkpoint of step {step} are safe in {directory}"


def no_space(error: BaseException | None) -> str | None:
    """The line for an error that comes, at whatever remove, from a full disk; None for any other."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else _os_error_code(error)
        if number in FULL:
            named = error.filename if isinstance(error, OSError) else _quoted_path(error)
            where = f" to write {named}" if named else ""
            return f"no disk space{where} ({os.strerror(number or 0)}); make room and start the same command again"
        error = error.__cause__ or error.__context__
    return None


def decided(directory: Path, found: Mapping[str, int]) -> dict[str, int]:
    """What an earlier part of the run decided from its machine, and of the rest ``found``, which is written down."""
    file = directory / DECIDED
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    begun = (directory / METRICS).exists()
    known = {**found, **before} if begun else {**before, **found}
    if known != before:
        write_json(file, known)
    return known


def time_of_start(directory: Path) -> int:
    """When the run began, on its own clock: seconds since 2000, see `moment`; now, where it has not begun."""
    now = int((datetime.datetime.now() - EPOCH).total_seconds())
    return decided(directory, {BEGAN: now})[BEGAN]


def recorded_start(directory: Path) -> datetime.datetime | None:
    """What `time_of_start` recorded; None where there is no such record."""
    file = directory / DECIDED
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return moment(known[BEGAN]) if BEGAN in known else None


def moment(seconds: int) -> datetime.datetime:
    """The time that `time_of_start` gave as a number."""
    return EPOCH + datetime.timedelta(seconds=seconds)


def note_environment(directory: Path, step: int, found: Mapping[str, str]) -> list[str]:
    """Record on what a run computes from ``step`` on; returns what changed since, as "name: before -> now".

    Args:
        directory: of the run.
        step: rollouts trained on before.
        found: versions of packages and the device.
    """
    file = directory / ENVIRONMENT
    past = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    before = past[-1] if past else None
    changed = [] if before is None else [f"{k}: {before.get(k)} -> {v}" for k, v in found.items() if before.get(k) != v]
    if changed or before is None:
        write_text(file, json.dumps([*past, {"from_step": step, **found}], indent=2) + "\n")
    return changed


def write_text(path: Path, text: str) -> None:
    """Write whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def _read_back(recorded: Path) -> TrainConfig:
    try:
        return TrainConfig.from_toml(recorded)
    except ValueError as error:
        raise ValueError(
            f"output_dir: {recorded} cannot be read ({str(error).splitlines()[0]}), so nobody knows whether its run "
            "may go on, and nothing was changed; name another output_dir, or use the version that wrote it"
        ) from error


def _os_error_code(error: BaseException) -> int | None:
    """The number that a checkpoint's writer puts into its text."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found[1]) if found else None


def _quoted_path(error: BaseException) -> str | None:
    """The checkpoint that was being written, by the name it would have had."""
    found = re.findall(r'"(/[^"]+)"', str(error))
    return found[-1].partition(".orbax-checkpoint-tmp")[0] if found else None


def _fresh(name: str) -> Path:
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    taken = 0
    while (directory := Path("runs") / f"{name}-{stamp}{f'-{taken}' if taken else ''}").exists():
        taken += 1
    return directory


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in table.items():
        path = f"{prefix}{key}"
        out |= _flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return out
