"""Reading a Hugging Face directory: config.json and safetensors, one file or a sharded index. Nothing is trusted."""

import json
import math
from collections.abc import Iterator
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

LFS = b"version https://git-lfs"
"""How the text begins that git keeps in place of a large file that was not fetched."""

PIECE = 2**20
"""Elements of a tensor that are read at once."""


@dataclass(frozen=True)
class Place:
    """Where a tensor is: its file, its first byte there, its dtype by safetensors' name, and its shape."""

    file: Path
    start: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Elements of a tensor and the memory that they fill; pieces may be read in any order, by many threads.

    Attributes:
        name: of the tensor.
        file: where it is.
        start: the first byte there.
        dtype: of the elements there.
        slot: [elements], contiguous, of any dtype.
    """

    name: str
    file: Path
    start: int
    dtype: np.dtype
    slot: np.ndarray

    def read(self) -> None:
        """Fills ``slot``."""
        value = self.slot if self.slot.dtype == self.dtype else np.empty(self.slot.shape, self.dtype)
        left = value.view(np.uint8).data
        with open(self.file, "rb", buffering=0) as file:  # a buffer would make large reads ten times slower
            file.seek(self.start)
            while len(left) and (count := file.readinto(left)):
                left = left[count:]
        if len(left):
            raise ValueError(
                f"{self.file}: got {len(left)} bytes less of {self.name} than before; it changed; load again"
            )
        if value is not self.slot:
            self.slot[...] = value


@dataclass(frozen=True)
class TensorFiles:
    """The tensors of a directory, read with plain reads: mapped files would stay in memory beside what is read.

    Attributes:
        directory: where they are.
        places: tensor name -> its place. The headers are checked: nothing overlaps, and all lies in its file.
    """

    directory: Path
    places: dict[str, Place]

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header; nothing is read."""
        return self.places[name].shape

    def dtype(self, name: str) -> str:
        """From the header: "float32", "bfloat16" or "float16"."""
        got = self.places[name].dtype
        if got not in DTYPES:
            raise ValueError(
                f"{self.directory}: tensor {name}: got dtype {got}; only {', '.join(DTYPES)} are read; "
                "convert the checkpoint, or use the one before quantisation"
            )
        return DTYPES[got]

    def read(self, name: str) -> np.ndarray:
        """The tensor in its own dtype."""
        value = np.empty(self.shape(name), np.dtype(self.dtype(name)))
        for piece in self.pieces(name, value):
            piece.read()
        return value

    def pieces(self, name: str, slot: np.ndarray, first_row: int = 0) -> Iterator[Piece]:
        """What fills ``slot``, contiguous, with the tensor's rows from ``first_row`` on, whatever shape both have."""
        place, dtype, flat = self.places[name], np.dtype(self.dtype(name)), slot.reshape(-1)
        first = first_row * math.prod(place.shape[1:])
        for at in range(0, flat.size, PIECE):
            yield Piece(name, place.file, place.start + (first + at) * dtype.itemsize, dtype, flat[at : at + PIECE])


def checkpoint_directory(directory: str | Path) -> Path:
    """``directory`` as a path, with a config.json in it.

    Raises:
        ValueError: it is not there, or holds no config.json.
    """
    path = Path(directory)
    if not path.is_dir():
        raise ValueError(
            f"{path}: there is no such directory (looked from {Path.cwd()}); check the path, or give what "
            "grpo_jax.data.resolve_model makes of a hub id"
        )
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


def open_tensors(directory: Path) -> TensorFiles:
    """Finds every tensor of a checkpoint; only headers are read.

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
    places: dict[str, Place] = {}
    for name in [SINGLE] if single else sorted(set(listed.values())):
        found = _read_header(directory / name)
        twice = found.keys() & places.keys()
        if twice:
            raise ValueError(f"{directory / name}: got tensor {min(twice)} twice; one file must have it; fetch again")
        places |= found
    for tensor, file in listed.items():
        if tensor not in places or places[tensor].file.name != file:
            raise ValueError(
                f"{directory / INDEX}: got {tensor} in {file}; that file does not have it; fetch both again"
            )
    return TensorFiles(directory, places)


def _read_header(path: Path) -> dict[str, Place]:
    if not path.is_file():  # reading a pipe would wait for ever
        raise ValueError(f"{path}: got no plain file; the index says that tensors are there; fetch it again")
    try:
        with safe_open(path, framework="numpy"):  # checks the header against the file
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        with open(path, "rb") as file:
            if file.read(len(LFS)) == LFS:
                raise ValueError(
                    f"{path}: got a pointer of Git LFS, which stands for the tensors; run git lfs pull there, or fetch "
                    "the checkpoint with hf download"
                ) from error
        raise ValueError(
            f"{path}: got a file that is not whole safetensors ({error}); it may be cut short; fetch it again"
        ) from error
    return {
        name: Place(path, 8 + length + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
        for name, entry in header.items()
        if name != "__metadata__"
    }


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
