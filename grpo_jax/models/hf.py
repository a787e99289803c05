"""Hugging Face directories in and out, strict both ways: ``load_model`` and ``save_hf``.

Parameters go one at a time. A stacked one is filled in place, piece by piece in several threads, and put into its
sharding, so that host memory is bounded by the largest stacked parameter; on the way out one layer's tensor is
gathered at a time, and a shard's tensors are held until it is written.
"""

import json
import math
import mmap
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from grpo_jax.models import transformer
from grpo_jax.models.checkpoint_files import (
    CONFIG,
    INDEX,
    SINGLE,
    Piece,
    TensorFiles,
    checkpoint_directory,
    has_tensors,
    open_tensors,
    read_json,
)
from grpo_jax.models.families import FAMILIES
from grpo_jax.models.model import Model
from grpo_jax.models.spec import DTYPES, ModelSpec, read_stop_ids
from grpo_jax.models.tensors import Entry, Tensor, list_tensors, tensor_entries
from grpo_jax.types import Params

GENERATION = "generation_config.json"
TOKENIZER = "tokenizer_config.json"
TEMPLATES = ("chat_template.jinja", "chat_template.json")
"""Files that hold a chat template; the first is what is read where both are."""
COPIED = (
    "tokenizer.json",
    TOKENIZER,
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    *TEMPLATES,
    GENERATION,
)
"""Files that ``save_hf`` copies from the source where they exist."""

READERS = 8
"""Threads that read at most: a read waits for the kernel to find pages for it, which more threads do at once."""

SHARD_BYTES = 5_000_000_000
PARTIAL = ".partial"
OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?(\.partial)?")
"""Tensor files of an older checkpoint, and what a crash left of one."""


def load_model(
    directory: str | Path,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    param_dtype: str | None = None,
    precision: str | None = None,
    remat: str = "none",
    longest: int = 0,
) -> tuple[Model, Params]:
    """Loads a Hugging Face directory; needs config.json and safetensors, no tokenizer.

    Args:
        directory: with config.json and model.safetensors, or model.safetensors.index.json and its files.
        dtype: what is computed in, "float32" or "bfloat16".
        mesh: the parameters go straight into their sharding on it; by default the first device.
        param_dtype: what the parameters are stored in, float32 by default, see ``Model``.
        precision: of `Model`.
        remat: of `Model`.
        longest: tokens of the longest text of the run. Only rotaries whose frequencies depend on a text's length ask
            for it; there a text longer than the model was first trained for is an error without it, and with it every
            text has the frequencies of the longest.

    Raises:
        ValueError: not a checkpoint, an unsupported one, a damaged file, a missing, unexpected or misshapen tensor.
    """
    model = read_model(directory, dtype, mesh, param_dtype, precision, remat, longest)
    tensors, listed = open_tensors(Path(directory)), list_tensors(model)
    _check(model, listed, tensors)
    rows = {
        (tensor.name, entry.part): sum(e.shape[0] for _, e in tensor.parts[:place])
        for tensor in listed
        for place, (_, entry) in enumerate(tensor.parts)
    }
    is_list = lambda node: isinstance(node, list)  # noqa: E731
    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as pool:
        read = partial(_read, pool, tensors, rows)
        return model, jax.tree.map(read, tensor_entries(model), model.abstract_params, is_leaf=is_list)


def read_model(
    directory: str | Path,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    param_dtype: str | None = None,
    precision: str | None = None,
    remat: str = "none",
    longest: int = 0,
) -> Model:
    """The model of a Hugging Face directory, without its parameters; see ``load_model``."""
    path = checkpoint_directory(directory)
    return Model(_read_spec(path, longest), dtype, param_dtype or "float32", precision, mesh, remat)


def save_hf(
    model: Model,
    params: Params,
    directory: str | Path,
    source: str | Path | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    chat_template: str | None = None,
) -> None:
    """Writes a Hugging Face directory that transformers, and ``load_model``, load with the same logits.

    On several hosts every process calls this and the first writes. Every file is first written under another name,
    and config.json gets its name last: what a crash leaves is the old checkpoint, or no checkpoint.

    Args:
        model: of the parameters.
        params: what is written; adapters are merged into the base.
        directory: made if it is not there. Tensor files of an older checkpoint in it are replaced, the rest stays.
        source: the directory the model came from: its config.json is kept whole, its tokenizer, chat template and
            generation_config.json are copied, and each tensor has the dtype it has there. It may be ``directory``.
        dtype: "float32", "bfloat16" or "float16" for every tensor instead. Without a source it is by default the
            dtype that config.json names, else the parameters'.
        shard_bytes: the largest size of a file of tensors (a larger tensor has a file to itself).
        chat_template: Jinja that the tokenizer is to have instead of the source's.

    Raises:
        ValueError: an unknown dtype, or a source or config of another model.
    """
    params, model = model.merged(params), model.base
    target, origin = Path(directory), None if source is None else checkpoint_directory(source)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}; tensors are written in {', '.join(DTYPES)}; use one of them")
    config = json.loads(model.spec.hf_config) if origin is None else read_json(origin / CONFIG)
    if ModelSpec.from_hf(config, model.spec.longest) != model.spec:
        where = "the model's own config" if origin is None else origin / CONFIG
        raise ValueError(f"{where}: got the config of another model; what is saved would not load; check the source")
    default = dtype or model.spec.dtype or model.param_dtype
    dtypes = {} if origin is None or dtype is not None else _source_dtypes(origin)
    shards = _plan_shards(list_tensors(model), dtypes, default, shard_bytes)
    writer = jax.process_index() == 0
    files = _write_tensors(model, params, target, shards, dtypes, default, writer)
    if writer:
        files += _write_small(target, origin, _config_text(model, config, origin, dtype, default), chat_template)
        _put_in_place(target, files)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_hf")


def _read_spec(path: Path, longest: int) -> ModelSpec:
    """config.json, with the stop tokens of generation_config.json beside its own."""
    try:
        spec = ModelSpec.from_hf(read_json(path / CONFIG), longest)
        generation = read_json(path / GENERATION) if (path / GENERATION).is_file() else {}
        return replace(spec, stop_ids=tuple(sorted({*spec.stop_ids, *read_stop_ids(generation)})))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check(model: Model, listed: list[Tensor], tensors: TensorFiles) -> None:
    family, where = FAMILIES[model.spec.family], tensors.directory
    expected = {tensor.name: tensor for tensor in listed}
    missing = [name for name in expected if name not in tensors.places]
    if missing:
        raise ValueError(
            f"{where}: got no tensor {_some(missing)}; config.json asks for it; check that the checkpoint is whole "
            "and that config.json is its own"
        )
    head = family.outer["head.kernel"].name
    unexpected = [
        name
        for name in tensors.places
        if name not in expected
        and not any(re.fullmatch(pattern, name) for pattern in family.harmless)
        and not (model.spec.tied and name == head)
    ]
    if unexpected:
        raise ValueError(
            f"{where}: got unexpected tensor {_some(unexpected)}; the model that config.json describes has no place "
            "for it; check that config.json is this checkpoint's own"
        )
    for name, tensor in expected.items():
        tensors.dtype(name)
        if tensors.shape(name) != tensor.shape:
            raise ValueError(
                f"{where}: tensor {name}: got shape {tensors.shape(name)}; config.json asks for {tensor.shape}; "
                "check that config.json is this checkpoint's own"
            )
    if model.spec.tied and head in tensors.places:
        embedding = family.outer["embed.kernel"].name
        if not np.array_equal(tensors.read(head), tensors.read(embedding)):
            raise ValueError(
                f"{where}: tensor {head}: got values other than {embedding}'s; tie_word_embeddings says they are "
                "one; set it to false in config.json, or remove the tensor"
            )


def _read(
    pool: ThreadPoolExecutor,
    tensors: TensorFiles,
    rows: dict[tuple[str, int], int],
    entries: list[Entry],
    target: jax.ShapeDtypeStruct,
) -> jax.Array:
    """One parameter, filled in place. ``rows``: a tensor's name and part -> the first row of the part."""
    buffer = _fresh(target.shape, target.dtype)
    pieces = (
        piece
        for entry in entries
        for piece in tensors.pieces(entry.name, buffer[(*entry.index, ...)], rows[entry.name, entry.part])  # type: ignore[arg-type]
    )
    for _ in pool.map(Piece.read, pieces):  # raises what a thread raised
        pass
    return transformer.place(buffer, target.sharding)


def _fresh(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of zeros in pages of its own, which XLA on a CPU takes as they are, without a copy.

    NumPy asks for huge pages, which a virtual machine may first have to get back from its host (docs/MODELS.md).
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = mmap.mmap(-1, max(size, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, np.uint8)[:size].view(dtype).reshape(shape)


def _plan_shards(tensors: list[Tensor], dtypes: dict[str, str], default: str, shard_bytes: int) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        bytes_ = math.prod(tensor.shape) * jnp.dtype(dtypes.get(tensor.name, default)).itemsize
        if shards[-1] and size + bytes_ > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += bytes_
    return shards


def _write_tensors(
    model: Model,
    params: Params,
    target: Path,
    shards: list[list[Tensor]],
    dtypes: dict[str, str],
    default: str,
    writer: bool,
) -> list[str]:
    """Gathers on every process, writes on one; the names of the files, which lie there as partial."""
    names = [SINGLE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
    gather = _gatherer(model, params)
    total = 0
    if writer:
        target.mkdir(parents=True, exist_ok=True)
    for name, shard in zip(names, shards, strict=True):
        held: dict[str, np.ndarray] = {}
        for tensor in shard:
            value = gather(tensor)
            if writer:
                held[tensor.name] = value.astype(jnp.dtype(dtypes.get(tensor.name, default)))
                total += held[tensor.name].nbytes
        if writer:
            save_file(held, target / (name + PARTIAL), metadata={"format": "pt"})
    if not writer or len(shards) == 1:
        return names
    listed = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(listed.items()))}
    (target / (INDEX + PARTIAL)).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*names, INDEX]


@lru_cache
def _picker(mesh: Mesh) -> Callable[[jax.Array, tuple[int, ...]], jax.Array]:
    """One function for all saves of a process, so that only the first compiles."""

    @partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def pick(leaf: jax.Array, index: tuple[int, ...]) -> jax.Array:
        for place in index:
            leaf = jax.lax.dynamic_index_in_dim(leaf, place, 0, keepdims=False)
        return leaf

    return pick


def _gatherer(model: Model, params: Params) -> Callable[[Tensor], np.ndarray]:
    """A function that gives a tensor, whole on this host."""
    pick, leaves = _picker(model.compute.mesh), jax.tree.leaves(params)

    def gather(tensor: Tensor) -> np.ndarray:
        parts = [np.asarray(pick(leaves[leaf], entry.index)).reshape(entry.shape) for leaf, entry in tensor.parts]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    return gather


def _write_small(target: Path, origin: Path | None, config: str, chat_template: str | None) -> list[str]:
    texts = {CONFIG: config}
    if chat_template is not None:
        texts |= _with_template(target if origin is None else origin, chat_template)
    names = []
    if origin is not None and origin.resolve() != target.resolve():
        for name in COPIED:
            if (origin / name).is_file() and name not in texts and (chat_template is None or name not in TEMPLATES):
                shutil.copyfile(origin / name, target / (name + PARTIAL))
                names.append(name)
    for name, text in texts.items():
        (target / (name + PARTIAL)).write_text(text, encoding="utf-8", newline="")
    return [*names, *(name for name in texts if name != CONFIG), CONFIG]


def _with_template(origin: Path, chat_template: str) -> dict[str, str]:
    """The files that say what the chat template is; one in the tokenizer's config is left out, as some read that."""
    texts = {TEMPLATES[0]: chat_template}
    if (origin / TOKENIZER).is_file():
        table = read_json(origin / TOKENIZER)
        if "chat_template" in table:
            del table["chat_template"]
            texts[TOKENIZER] = json.dumps(table, indent=2, ensure_ascii=False) + "\n"
    return texts


def _put_in_place(target: Path, files: list[str]) -> None:
    """Gives every partial file its name, config.json's last: without it a directory is no checkpoint."""
    mode = (target / (CONFIG + PARTIAL)).stat().st_mode
    for name in files:
        os.chmod(target / (name + PARTIAL), mode)  # safetensors makes its files for the owner alone
        with open(target / (name + PARTIAL), "rb") as file:
            os.fsync(file.fileno())
    (target / CONFIG).unlink(missing_ok=True)
    waiting = {name + PARTIAL for name in files}
    for path in list(target.iterdir()):
        if OURS.fullmatch(path.name) and path.name not in waiting:
            path.unlink()
    for name in sorted(files, key=lambda name: name == CONFIG):
        os.replace(target / (name + PARTIAL), target / name)


def _config_text(model: Model, config: dict[str, Any], origin: Path | None, dtype: str | None, default: str) -> str:
    if origin is not None and dtype in (None, ModelSpec.from_hf(config).dtype):
        return (origin / CONFIG).read_text(encoding="utf-8")
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    config = {"architectures": [FAMILIES[model.spec.family].architecture]} | config | {key: default}
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _source_dtypes(origin: Path) -> dict[str, str]:
    if not has_tensors(origin):
        return {}
    tensors = open_tensors(origin)
    return {name: tensors.dtype(name) for name in tensors.places}


def _shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _some(names: list[str]) -> str:
    rest = len(names) - 3
    return ", ".join(names[:3]) + (f" and {rest} more" if rest > 0 else "")
