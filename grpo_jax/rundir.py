"""The directory of a run: what is in it, whether a config may go on in it, what is safe after an error.

Where a run starts: (1) the directory holds a checkpoint of the same config, or of one that differs in fields that a
run may change: go on from the newest; (2) it holds one of another config, or other files: refuse and show the
difference; (3) it is empty or new, or its run ended before it had a checkpoint: start from the model, with what was
recorded put aside.
"""

import datetime
import errno
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_jax.config import CheckpointConfig, EvalConfig, LogConfig, MeshConfig, TrainConfig
from grpo_jax.lock import LOCK, Lock
from grpo_jax.manifest import MANIFEST

CONFIG, SUMMARY, METRICS, COMPLETIONS = "config.toml", "summary.json", "metrics.jsonl", "completions.jsonl"
CHECKPOINTS, ENVIRONMENT, DECIDED, WARNINGS = "checkpoints", "environment.json", "decided.json", "warnings.jsonl"
BEGAN = "began.json"
EPOCH = datetime.datetime(2000, 1, 1)
"""From which times are counted, so that they are numbers of 32 bits."""
UNRECORDED = frozenset(
    {"output_dir", "compilation_cache", "mesh.coordinator", "mesh.process_id", "mesh.platform"}
    | {f"log.{name}" for name in LogConfig.model_fields}
)
"""Fields that say nothing of a run, so that it may go on with others and nobody need know."""
BESIDE = frozenset(
    {"reward.timeout_seconds", "reward.memory_limit_mb", "reward.environment"}
    | {f"checkpoint.{name}" for name in CheckpointConfig.model_fields}
    | {f"eval.{name}" for name in EvalConfig.model_fields if name != "stop"}
    | {f"eval.stop.{name}" for name in EvalConfig().stop.model_dump()}
)
"""Fields that change when a run looks, saves or gives up, and nothing that it learns."""
ROUNDING = (
    frozenset(
        {"optim.microbatch_rows", "model.remat", "batch.row_len", "rollout.slots", "rollout.kv_memory_mb"}
        | {"rollout.schedule", "rollout.layout", "rollout.attention"}
        | {f"mesh.{name}" for name in MeshConfig.model_fields}
    )
    - UNRECORDED
)
"""Fields that say how the same numbers are computed: with others they differ by rounding (contract 5)."""
MOST_SHOWN = 6
"""Differences listed in an error."""
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Error numbers of a write for which there is no room."""


@dataclass(frozen=True)
class Opened:
    """A run's directory that this process holds.

    Attributes:
        directory: where it is.
        lock: that is held; whoever opened closes it last.
        facts: lines worth telling.
        warnings: lines to warn of.
    """

    directory: Path
    lock: Lock
    facts: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def open_run(config: TrainConfig, name: str) -> Opened:
    """Create or re-open the run's directory, take hold of it, and write its config.

    Args:
        config: resolved.
        name: what a directory of our own choice is called after.

    Raises:
        ValueError: the directory holds a run of another config, or files that are no run, or another process has it.
    """
    directory = Path(config.output_dir) if config.output_dir else _fresh(name)
    _changes(directory, config)  # what is refused is left as it was
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = Lock(directory)
        try:
            return _opened(directory, lock, config)
        except BaseException:
            lock.close()
            raise
    except OSError as error:
        if error.errno in FULL:
            raise
        why = f"{error.strerror}: {error.filename}"
        raise ValueError(f"output_dir: {directory} cannot be written to ({why}); name another place") from error


def _opened(directory: Path, lock: Lock, config: TrainConfig) -> Opened:
    """What is done once nobody else can write there."""
    changes = _changes(directory, config)
    facts, warnings = [], []
    if (directory / CONFIG).exists() and newest_checkpoint(directory) is None:
        kept = _put_aside(directory)
        changes = dict.fromkeys(changes, "")
        if kept is not None:
            facts.append(f"no checkpoint yet in {directory}: begins anew, what was recorded is kept in {kept}")
    rounding = [f"{path}: {change}" for path, change in changes.items() if change and path in ROUNDING]
    if rounding:
        (directory / DECIDED).unlink(missing_ok=True)  # it was decided for the others
        warnings.append(
            f"this run goes on with other values than it was begun with ({'; '.join(rounding)}): they change its "
            "numbers by rounding only, so it is no longer to the bit what it would have been. Nothing is to be done."
        )
    beside = [f"{path}: {change}" for path, change in changes.items() if change and path not in ROUNDING]
    if beside:
        facts.append(f"going on with {'; '.join(beside)}")
    if changes or not (directory / CONFIG).exists():
        write_text(directory / CONFIG, config.to_toml())
    return Opened(directory, lock, tuple(facts), tuple(warnings))


def _changes(directory: Path, config: TrainConfig) -> dict[str, str]:
    """Fields, and how they change, in which a run's config differs from the recorded one and may.

    Raises:
        ValueError: it may not, or the directory is none of a run.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"output_dir: {directory} is a file, but a run needs a directory; name another place")
    if not (directory / CONFIG).exists():
        if directory.exists() and any(place.name != LOCK for place in directory.iterdir()):
            raise ValueError(
                f"output_dir: {directory} holds files and no {CONFIG}, so it is no run, and nothing was changed; "
                "name an empty or new directory"
            )
        return {}
    recorded = _read_back(directory / CONFIG)
    different = differences(recorded, config)
    if different and ((directory / METRICS).exists() or newest_checkpoint(directory) is not None):
        more = f" and {len(different) - MOST_SHOWN} more" if len(different) > MOST_SHOWN else ""
        raise ValueError(
            f"output_dir: {directory} holds a run of another config ({'; '.join(different[:MOST_SHOWN])}{more}); "
            "nothing was changed; give the recorded values to go on, or another output_dir"
        )
    return {path: change for path, change in _changed(recorded, config).items() if path not in UNRECORDED}


def differences(recorded: TrainConfig, asked: TrainConfig) -> list[str]:
    """Fields in which two configs differ, as "path: recorded -> asked", but for those in which a run may.

    A run may be made longer where its learning rates do not depend on its length.
    """
    may = UNRECORDED | BESIDE | ROUNDING
    if asked.steps > recorded.steps and asked.optim.schedule == asked.critic.schedule == "constant":
        may = may | {"steps"}
    return [f"{path}: {change}" for path, change in _changed(recorded, asked).items() if path not in may]


def _changed(recorded: TrainConfig, asked: TrainConfig) -> dict[str, str]:
    old, new = _flat(recorded.model_dump()), _flat(asked.model_dump())
    return {
        path: f"{old.get(path, 'not there')!r} -> {new.get(path, 'not there')!r}"
        for path in {**old, **new}
        if old.get(path) != new.get(path)
    }


def _put_aside(directory: Path) -> Path | None:
    """Leave nothing of a start that had come to no checkpoint; where its record is kept, None where it had none."""
    own = [directory / name for name in (METRICS, COMPLETIONS, WARNINGS, DECIDED, BEGAN, ENVIRONMENT, SUMMARY)]
    if not own[0].is_file() or not own[0].stat().st_size:
        for file in own:
            file.unlink(missing_ok=True)
        return None
    taken = 1
    while (kept := directory / f"before-{taken}").exists():
        taken += 1
    kept.mkdir()
    for file in reversed(own):  # the metrics last: while they are there, a kill leaves this to be done again
        if file.exists():
            file.rename(kept / file.name)
    return kept


def newest_checkpoint(directory: Path, sealed: bool = False) -> int | None:
    """Step of the newest checkpoint by its name, or of those whose manifest is written.

    Args:
        directory: of the run.
        sealed: count those alone.
    """
    places = [place for place in (directory / CHECKPOINTS).glob("*") if place.name.isdecimal()]
    steps = [int(place.name) for place in places if not sealed or (place / MANIFEST).exists()]
    return max(steps, default=None)


def what_is_safe(directory: Path) -> str | None:
    """What an error left of a run, in words; None where it had trained on nothing."""
    metrics, step = directory / METRICS, newest_checkpoint(directory, sealed=True)
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
    """What an earlier part of the run decided from its machine, or else ``found``, which is written down.

    Raises:
        ValueError: what was written down is damaged.
    """
    file = directory / DECIDED
    if file.exists() and (directory / METRICS).exists():
        past = _json_of(file)
        known = isinstance(past, dict) and past.keys() == found.keys()
        if not known or any(type(value) is not int or value < 1 for value in past.values()):
            raise ValueError(
                f"output_dir: {file} is damaged, so nobody knows what the run decided from its machine; delete it, and "
                "that is decided again, which changes its numbers by rounding only"
            )
        return past
    write_json(file, dict(found))
    return dict(found)


def time_of_start(directory: Path) -> int:
    """When the run began, by its machine's clock, in seconds since 2000: now, where it has not; see `moment`.

    Raises:
        ValueError: what was written down is damaged.
    """
    began = recorded_start(directory) if (directory / METRICS).exists() else None
    if began is None:
        began = datetime.datetime.now().replace(microsecond=0)
        write_json(directory / BEGAN, {"time": began.isoformat()})
    return int((began - EPOCH).total_seconds())


def recorded_start(directory: Path) -> datetime.datetime | None:
    """What `time_of_start` wrote down; None where it did not.

    Raises:
        ValueError: it is damaged.
    """
    file = directory / BEGAN
    if not file.is_file():
        return None
    try:
        return datetime.datetime.fromisoformat(_json_of(file)["time"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"output_dir: {file} is damaged, so nobody knows which date the run's chat template was told; delete it, "
            "and that is today's from here on"
        ) from error


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
    past = _json_of(file) if file.exists() else []
    changed = list[str]()
    if not isinstance(past, list) or not all(isinstance(entry, dict) for entry in past):
        file.replace(file.with_name(f"{file.name}.damaged"))
        past, changed = [], [f"{file.name} cannot be read and is begun again"]
    before = past[-1] if past else None
    if before is not None:
        changed = [f"{k}: {before.get(k)} -> {v}" for k, v in found.items() if before.get(k) != v]
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


def _json_of(file: Path) -> Any:
    """What a file holds; None where nobody can read it."""
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return None


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
