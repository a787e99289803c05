"""The directory of a run: what is in it, whether a config may go on in it, and the summary at the end.

Where a run starts: (1) the directory holds a checkpoint of the same config: go on from the newest; (2) it holds one
of another config, or other files: refuse and show the difference; (3) it is empty or new, or its run ended before it
had sampled anything (a path was wrong, say): start from the model.
"""

import datetime
import json
from pathlib import Path
from typing import Any

from grpo_jax.config import LogConfig, TrainConfig

CONFIG, SUMMARY, METRICS, COMPLETIONS = "config.toml", "summary.json", "metrics.jsonl", "completions.jsonl"
MAY_DIFFER = frozenset(
    {"output_dir", "compilation_cache", "mesh.coordinator", "mesh.process_id"}
    | {f"log.{name}" for name in LogConfig.model_fields}
)
"""Fields that change nothing a run computes, so that it may go on with others."""


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
        raise ValueError(f"output_dir: {directory} is a file; a run needs a directory. Name another place.")
    recorded = directory / CONFIG
    if recorded.exists():
        different = differences(TrainConfig.from_toml(recorded), config)
        if different and (directory / METRICS).exists():
            raise ValueError(
                f"output_dir: {directory} holds a run of another config:\n  "
                + "\n  ".join(different)
                + "\nNothing was changed. Use the same config to go on, or another output_dir."
            )
        if not different:
            return directory
    elif directory.exists() and any(directory.iterdir()):
        raise ValueError(f"output_dir: {directory} holds files and no {CONFIG}. Use an empty or new directory.")
    directory.mkdir(parents=True, exist_ok=True)
    partial = recorded.with_suffix(".partial")
    partial.write_text(config.to_toml(), encoding="utf-8")
    partial.replace(recorded)
    return directory


def differences(recorded: TrainConfig, asked: TrainConfig) -> list[str]:
    """Fields in which two configs differ, as "path: recorded -> asked"."""
    old, new = _flat(recorded.model_dump()), _flat(asked.model_dump())
    return [f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in new if old.get(k) != new[k] and k not in MAY_DIFFER]


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


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
