"""Where a model or a dataset lies: what the package ships, a path of this machine, or an id of the Hugging Face hub.

What looks like a path is never looked up on the hub. The hub's own settings hold: HF_HOME and HF_HUB_CACHE (its
cache), HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

import importlib.resources
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SHIPPED = {"model": "model", "train": "train.jsonl", "eval": "eval.jsonl"}
"""What the package ships for the quickstart, by kind."""
WANTED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt")
"""Files of a model that are downloaded: weights as safetensors, configs, tokenizers, templates; nothing pickled."""
UNWANTED = ("*/*", "consolidated*")
"""Copies of the weights in other layouts that some repositories hold besides."""

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def shipped(kind: str) -> Path:
    """What the package ships for the quickstart.

    Args:
        kind: a key of ``SHIPPED``.

    Raises:
        ValueError: the package was installed without it.
    """
    path = Path(str(importlib.resources.files("grpo_jax"))) / "quickstart" / SHIPPED[kind]
    if not path.exists():
        raise ValueError(f"quickstart: {path} is not there; install grpo_jax again, or name a path of your own")
    return path


def is_hub_id(text: str) -> bool:
    """Whether it has the form owner/name and does not look like a path of this machine."""
    return _ID.fullmatch(text) is not None and not text.endswith(
        (".json", ".jsonl", ".csv", ".parquet", ".safetensors")
    )


def resolve_model(path: str | os.PathLike[str], revision: str | None = None, wanted: Sequence[str] = WANTED) -> Path:
    """The directory of a checkpoint, downloaded into the hub's cache where it is a hub id.

    Args:
        path: "quickstart", a directory, or "owner/name" on the hub.
        revision: branch, tag or commit of a hub id.
        wanted: patterns of the files that are downloaded.

    Raises:
        ValueError: no such directory and no such id, one that may not be read, or a hub that cannot be reached.
    """
    if str(path) == "quickstart":
        return shipped("model")
    place = Path(path).expanduser()
    if place.is_dir():
        if revision is not None:
            raise ValueError(f"model.revision: got {revision!r}, but {str(path)!r} is a directory; leave it out")
        if not (place / "config.json").is_file():
            holds = ", ".join(sorted(file.name for file in place.iterdir())[:8]) or "nothing"
            raise ValueError(
                f"model.path: {str(path)!r} is no checkpoint: it holds {holds}; give the directory that holds "
                "config.json, the .safetensors files and the tokenizer's"
            )
        return place
    if place.exists():
        raise ValueError(f"model.path: {str(path)!r} is a file; give the directory of a Hugging Face checkpoint")
    if not is_hub_id(str(path)):
        raise ValueError(
            f"model.path: directory {str(path)!r} does not exist (looked from {Path.cwd()}); give the directory of a "
            'Hugging Face checkpoint, or a hub id "owner/name"'
        )
    return _download(str(path), revision, wanted)


def _download(name: str, revision: str | None, wanted: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        with retries_unsaid():
            directory = snapshot_download(
                name, revision=revision, allow_patterns=list(wanted), ignore_patterns=list(UNWANTED)
            )
    except Exception as error:
        raise ValueError(f"model.path: {name!r} is no directory here, and {explain(error, revision)}") from error
    return Path(directory)


@contextmanager
def retries_unsaid() -> Iterator[None]:
    """Keeps a hub that cannot be reached from telling of every try: the error at the end says it once."""
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(level)


def explain(error: Exception, revision: str | None = None) -> str:
    """What a failed look-up on the hub means, and what to do; to follow "... is no path here, and"."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return "on the hub it is gated: accept its terms on its page, then log in (hf auth login) or set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"on the hub it has no revision {revision!r}; correct it"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has none of that name, or a private one; correct it, or log in (hf auth login) or set HF_TOKEN"
    if constants.HF_HUB_OFFLINE and isinstance(error, OSError):
        return "it is not in the hub's cache, while HF_HUB_OFFLINE forbids to download it; unset that, or give a path"
    if isinstance(error, errors.LocalEntryNotFoundError | ConnectionError):
        return f"{constants.ENDPOINT} cannot be reached; check the network, or give a path"
    said = " ".join(str(error).split())[:200].rstrip(".")
    return f"the hub did not give it ({type(error).__name__}: {said}); correct it, or give a path"
