"""What a run is given besides its config: digests of rows, tokenizer, templates, model files and functions.

They are part of every checkpoint's record, so that a run that goes on with others says so, or is refused.
"""

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from grpo_jax.config import TrainConfig
from grpo_jax.data import PromptSet, PromptStream

TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")
TEMPLATE = ("chat_template*", "additional_chat_templates/*")
"""Files of a model's directory, as patterns."""
MAY_CHANGE = ("reward ", "function ", "data.eval")
"""What these begin with may be another when a run goes on, which it then says: a reward can be mended."""
SHOWN = 12
"""Characters of a digest in a message."""


def digests(
    config: TrainConfig,
    source: Path,
    prompts: PromptStream,
    held_out: Mapping[str, PromptSet],
    stops: Iterable[int],
) -> dict[str, str]:
    """What each input is, by its name.

    Args:
        config: of the run.
        source: directory of the model.
        prompts: that it trains on.
        held_out: that it is judged by.
        stops: tokens that end a completion.
    """
    own = config.data.chat_template
    templates = [*_files(source, TEMPLATE), *([Path(own)] if own is not None else [])]
    out = {
        "data.train": prompts.digest(),
        **{f"data.eval {name}": part.digest() for name, part in held_out.items()},
        "tokenizer": _sha256(*map(Path.read_bytes, _files(source, TOKENIZER))),
        "chat template": _sha256(*map(Path.read_bytes, templates)),
        "config.json of the model": _model_config(source),
        "stop tokens": str(sorted(stops)),
    }
    learning = (config.algorithm.advantage, str(config.algorithm.model_dump()["loss"]["surrogate"]))
    functions = [("reward", spec) for spec in config.reward.functions] + [("function", spec) for spec in learning]
    return out | {f"{kind} {spec}": digest for kind, spec in functions if (digest := _source(spec))}


def compare(recorded: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What changed of that which may, in words.

    Args:
        recorded: what the run was given so far; empty where an older version recorded nothing.
        now: what it is given.

    Raises:
        ValueError: what may not has changed.
    """
    changed = {
        name: f"{name} ({recorded[name][:SHOWN]} -> {now[name][:SHOWN]})"
        for name in recorded
        if name in now and now[name] != recorded[name]
    }
    refused = [text for name, text in changed.items() if not name.startswith(MAY_CHANGE)]
    if refused:
        raise ValueError(
            f"output_dir: the run there was given something else until now: {'; '.join(refused)}. What it goes on from "
            "means nothing with another; put back what it was, or name another output_dir"
        )
    return [f"this run goes on with another {text}, from this step on" for text in changed.values()]


def _sha256(*parts: bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()


def _files(place: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in place.glob(pattern) if path.is_file()})


def _model_config(source: Path) -> str:
    """What config.json says, but for the version of the library that wrote it."""
    table = json.loads((source / "config.json").read_bytes())
    table.pop("transformers_version", None)
    return _sha256(json.dumps(table, sort_keys=True).encode())


def _source(spec: str) -> str | None:
    """Digest of the file that a user's function is in; None where there is none, or it is one of ours."""
    place, colon, _ = spec.rpartition(":")
    if not colon:
        return None
    try:
        found = None if place.endswith(".py") else importlib.util.find_spec(place)
        file = place if place.endswith(".py") else found.origin if found else None
        return None if file is None else _sha256(Path(file).read_bytes())
    except (OSError, ValueError, ImportError):  # a function of a notebook, say
        return None
