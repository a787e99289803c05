"""Reading a Hugging Face directory: config.json and safetensors, one file or a sharded index. Nothing is trusted."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (gives NumPy, and safetensors' NumPy reader, its bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""safetensors' name -> ours, for the dtypes that are read."""


@dataclass(frozen=True)
class TensorFile:
    """Open tensors of a directory; valid inside ``open_tensors``.

    Attributes:
        directory: where they are.
        handles: tensor name -> the open file that has it.
    """

    directory: Path
    handles: dict[str, Any]

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header; nothing is read."""
        return tuple(self.handles[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """From the header: "float32", "bfloat16" or "float16"."""
        got = self.handles[name].get_slice(name).get_dtype()
        if got not in DTYPES:
            raise ValueError(
                f"{self.directory}: tensor {name}: got dtype {got}; only {', '.join(DTYPES)} are read; "
                "convert the checkpoint, or use the one before quantisation"
            )
        return DTYPES[got]

    def read(self, name: str) -> np.ndarray:
        """The tensor, copied from the file."""
        return self.handles[name].get_tensor(name)

    def read_rows(self, name: str, start: int, count: int) -> np.ndarray:
        """``count`` rows of the tensor from ``start`` on; the others are not read."""
        return self.handles[name].get_slice(name)[start : start + count]


def checkpoint_directory(directory: str | Path) -> Path:
    """``directory`` as a path, with a config.json in it.

    Raises:
        ValueError: it is not there, or holds no config.json.
    """
    path = Path(directory)
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such directory; a checkpoint is a directory; check the path")
    if not (path / CONFIG).is_file():
        raise ValueError(
            f"{path}: got a directory without {CONFIG}; it is not a checkpoint in Hugging Face's format, or was not "
            "written to the end; give the directory that holds config.json and model.safetensors"
        )
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: it is not one.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: got a file that is not JSON ({error}); it may be cut short; fetch it again"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: got {type(value).__name__}; a JSON object is needed; fetch it again")
    return value


def has_tensors(directory: Path) -> bool:
    """Whether there is a file of tensors, or an index of several."""
    return (directory / SINGLE).is_file() or (directory / INDEX).is_file()


@contextmanager
def open_tensors(directory: Path) -> Iterator[TensorFile]:
    """Opens every tensor file of a checkpoint; only headers are read.

    Raises:
        ValueError: no file, a damaged one, or an index that does not fit its files or points outside the directory.
    """
    if not has_tensors(directory):
        raise ValueError(
            f"{directory}: got neither {SINGLE} nor {INDEX}; only safetensors is read (a pickle can run code); "
            "convert the checkpoint with transformers' save_pretrained"
        )
    single = (directory / SINGLE).is_file()
    listed = {} if single else _read_index(directory / INDEX)
    handles: dict[str, Any] = {}
    with ExitStack() as stack:
        for file in [SINGLE] if single else sorted(set(listed.values())):
            handle = stack.enter_context(_open(directory / file))
            for name in handle.keys():  # noqa: SIM118  (not a dict)
                if name in handles:
                    raise ValueError(f"{directory / file}: got tensor {name} twice; one file must have it; fetch again")
                handles[name] = handle
            for name in (name for name, where in listed.items() if where == file):
                if handles.get(name) is not handle:
                    raise ValueError(
                        f"{directory / INDEX}: got {name} in {file}; that file does not have it; fetch both again"
                    )
        yield TensorFile(directory, handles)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: got a file that is not whole safetensors ({error}); it may be cut short; fetch it again"
        ) from error


def _read_index(path: Path) -> dict[str, str]:
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{path}: got no weight_map; an index lists the file of each tensor; fetch it again")
    for name, file in listed.items():
        if not isinstance(file, str) or "/" in file or "\\" in file or "\0" in file or file in ("", ".", ".."):
            raise ValueError(
                f"{path}: got {file!r} as the file of {name}; it must be a plain name of a file beside the index; "
                "do not use this checkpoint"
            )
    return listed
