"""Rows of a dataset from wherever they lie: files, directories, the hub, objects of Python. Host only.

A source is read by one row of the table ``READERS`` (files, by their ending) or one of the functions beside it.
pyarrow and datasets, the extra ``data``, are loaded by the sources that need them.
"""

import csv
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, Literal

from grpo_jax.data.places import explain, is_hub_id, retries_unsaid, shipped

Row = Mapping[str, Any]
Rows = list[dict[str, Any]]
Kind = Literal["train", "eval"]

NEEDS_EXTRA = "needs the extra `data`: pip install 'grpo_jax[data]'"
FORMS = (
    "give a .jsonl, .json, .csv or .parquet file, a directory that datasets' save_to_disk wrote, or a hub dataset "
    '"owner/name:split" or "owner/name/config:split"'
)


NOTHING: Any = object()
"""What `find_column` gives where there is no such column; None is a value."""


def find_column(row: Row, name: str) -> Any:
    """The value of a column, or of a nested one by its dotted name; NOTHING where there is none.

    >>> find_column({"reward_model": {"ground_truth": "51"}}, "reward_model.ground_truth")
    '51'
    """
    if name in row:
        return row[name]
    parts = name.split(".")
    for count in range(1, len(parts)):
        outer = row.get(".".join(parts[:count]), NOTHING)
        if outer is None:
            return None
        if isinstance(outer, Mapping) and (found := find_column(outer, ".".join(parts[count:]))) is not NOTHING:
            return found
    return NOTHING


def load_dataset(
    source: Any,
    *,
    prompt_column: str | None = "prompt",
    rename_columns: Mapping[str, str] | None = None,
    columns: Collection[str] | None = None,
    kind: Kind = "train",
) -> Rows:
    """The rows of one source, all with the same columns.

    Args:
        source: "quickstart", a path, a hub dataset, or rows: a ``datasets.Dataset`` or any other iterable of mappings.
        prompt_column: the column every row needs, under its new name where it is renamed; None for no such column.
        rename_columns: old name -> new name, of columns that are there; a nested one gets a column of its own.
        columns: those that have to be the same in every row; None: all.
        kind: which of its two files "quickstart" means.

    Raises:
        ValueError: nothing of that name, a file that cannot be read, no rows, or rows with other columns.
    """
    rows, places = _read(source, kind)
    rows = [_renamed(row, rename_columns or {}, place) for row, place in zip(rows, places, strict=True)]
    check_rows(rows, prompt_column, places, columns)
    return rows


def check_rows(
    rows: Sequence[Row],
    prompt_column: str | None = "prompt",
    places: Sequence[str] | None = None,
    columns: Collection[str] | None = None,
) -> None:
    """Refuse rows that cannot be trained on.

    Args:
        rows: to look at.
        prompt_column: the column every row needs; None for none.
        places: what to call each row in an error; None for its number.
        columns: those that have to be the same in every row; None: all.

    Raises:
        ValueError: no rows, a row without the prompt column, or with other columns than the first row.
    """
    if not rows:
        raise ValueError("dataset: got no rows; it needs at least one" + _with_column(prompt_column))
    for number, row in enumerate(rows):
        place = f"row {number}" if places is None else places[number]
        if prompt_column is not None and find_column(row, prompt_column) is NOTHING:
            raise ValueError(
                f"{place}: no column {prompt_column!r}, it has {sorted(row)}; rename one or set data.prompt_column"
            )
        if columns is None and row.keys() != rows[0].keys():
            missing, extra = sorted(rows[0].keys() - row.keys()), sorted(row.keys() - rows[0].keys())
            raise ValueError(
                f"{place}: columns unlike the first row's: missing {missing}, extra {extra}, but a reward function "
                "gets whole columns; give every row the same ones (null where there is no value)"
            )


def describe(source: Any) -> Any:
    """What a run's record says of a source: its name, or how many rows were handed in; of a mixture each weight."""
    if source is None or isinstance(source, str | int | float):
        return source
    if isinstance(source, Path):
        return str(source)
    if isinstance(source, Mapping):
        return {name: describe(part) for name, part in source.items()}
    return f"<{len(source)} rows>" if isinstance(source, Sized) else "<rows>"


def _read(source: Any, kind: Kind) -> tuple[Rows, list[str]]:
    """Rows, and what to call each of them in an error."""
    if isinstance(source, Path | str):
        return _read_name(str(source), kind)
    if isinstance(source, Mapping):
        raise ValueError(f"data.{kind}: got splits {list(source)}, where one dataset is needed; give one of them")
    if not isinstance(source, Iterable):
        raise ValueError(f"data.{kind}: got a {type(source).__name__}, which holds no rows; {FORMS}, or rows")
    rows = list(source)
    wrong = next((number for number, row in enumerate(rows) if not isinstance(row, Mapping)), None)
    if wrong is not None:
        raise ValueError(f"row {wrong}: a {type(rows[wrong]).__name__}, not a mapping of columns; give dicts")
    return [dict(row) for row in rows], _numbered("row", rows, first=0)


def _read_name(name: str, kind: Kind) -> tuple[Rows, list[str]]:
    if name == "quickstart":
        return _json_lines(shipped(kind))
    path = Path(name).expanduser()
    if path.is_dir():
        return _saved_dataset(path)
    if path.exists():
        reader = READERS.get(path.suffix.lower())
        if reader is None:
            raise ValueError(f"data file {name!r}: its ending is {path.suffix!r}, and read are {', '.join(READERS)}")
        return reader(path)
    repository, _, split = name.partition(":")
    owner, _, rest = repository.partition("/")
    dataset, _, config = rest.partition("/")
    if is_hub_id(f"{owner}/{dataset}") and "/" not in config and path.suffix.lower() not in READERS:
        return _hub_dataset(f"{owner}/{dataset}", config or None, split or None)
    raise ValueError(f"data file {name!r} does not exist (looked from {Path.cwd()}); {FORMS}")


def _json_lines(file: Path) -> tuple[Rows, list[str]]:
    with file.open("rb") as lines:
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"data file {str(file)!r} is empty; it needs one JSON object a line")
    places = [f"{file}, line {number}" for number, _ in numbered]
    return [_object(_parse(line, place), place) for (_, line), place in zip(numbered, places, strict=True)], places


def _json(file: Path) -> tuple[Rows, list[str]]:
    """A JSON array of objects; one object a line is read as well, as such files are often named .json."""
    content = file.read_bytes()
    if not content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        return _json_lines(file)
    values = _parse(content, str(file))
    places = _numbered(str(file), values)
    return _nonempty(file, [_object(value, place) for value, place in zip(values, places, strict=True)]), places


def _csv(file: Path) -> tuple[Rows, list[str]]:
    """A header, then rows of as many fields; every value is a string."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, strict=True)
            numbered = [(reader.line_num, fields) for fields in reader if fields]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 ({error}); save the file as UTF-8") from error
    except csv.Error as error:
        raise ValueError(f"{file}: not CSV ({error}); quote fields that hold commas, quotes or line ends") from error
    (_, header), *rest = numbered or [(0, [])]
    for number, fields in rest:
        if len(fields) != len(header):
            raise ValueError(
                f"{file}, line {number}: {len(fields)} fields, but the header has {len(header)}; quote fields that "
                "hold commas, quotes or line ends"
            )
    if len(set(header)) < len(header):
        raise ValueError(f"{file}: columns {header} repeat a name; rename one")
    rows = [dict(zip(header, fields, strict=True)) for _, fields in rest]
    return _nonempty(file, rows), [f"{file}, line {number}" for number, _ in rest]


def _parquet(file: Path) -> tuple[Rows, list[str]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f"data file {str(file)!r}: Parquet {NEEDS_EXTRA}") from error
    try:
        rows = parquet.read_table(file).to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{file}: not Parquet ({_short(error)}); write it again") from error
    return _nonempty(file, rows), _numbered(str(file), rows)


READERS: dict[str, Callable[[Path], tuple[Rows, list[str]]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
"""What reads a file, by its ending."""


def _saved_dataset(directory: Path) -> tuple[Rows, list[str]]:
    if (directory / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in directory.iterdir() if path.is_dir())
        raise ValueError(f"data directory {str(directory)!r} holds splits {splits}; give one of these directories")
    if not (directory / "state.json").is_file():
        raise ValueError(f"data directory {str(directory)!r} holds no dataset; {FORMS}")
    datasets = _datasets(f"data directory {str(directory)!r}")
    try:
        rows = list(datasets.load_from_disk(str(directory)))
    except Exception as error:  # of several packages, and the files are not ours
        raise ValueError(f"data directory {str(directory)!r}: not readable ({_short(error)}); save it again") from error
    return _nonempty(directory, rows), _numbered(str(directory), rows)


def _hub_dataset(name: str, config: str | None, split: str | None) -> tuple[Rows, list[str]]:
    place = f"dataset {name!r}"
    datasets = _datasets(place)
    try:
        with retries_unsaid():
            loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # of several packages; the cause is said
        raise ValueError(f"{place} is no file here, and {explain(error)}") from error
    if isinstance(loaded, Mapping):
        if len(loaded) > 1:
            raise ValueError(
                f"{place} has splits {list(loaded)}; name one, as {name}{f'/{config}' if config else ''}:train"
            )
        loaded = next(iter(loaded.values()))
    rows = list(loaded)
    return _nonempty(name, rows), _numbered(place, rows, first=0)


def _datasets(place: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{place} {NEEDS_EXTRA}") from error
    return datasets


def _renamed(row: dict[str, Any], names: Mapping[str, str], place: str) -> dict[str, Any]:
    """Columns under their new names; those that the row does not have are no mistake here, as datasets differ."""
    for old, new in names.items():
        if old in row and new in row and new not in names:
            raise ValueError(f"{place}: data.rename_columns makes {old!r} {new!r}, which is there; rename that one too")
    nested = {new: find_column(row, old) for old, new in names.items() if old not in row}
    return {names.get(name, name): value for name, value in row.items()} | {
        new: value for new, value in nested.items() if value is not NOTHING
    }


def _numbered(place: str, rows: Sequence[Any], first: int = 1) -> list[str]:
    return [
        f"{place}, row {number}" if place != "row" else f"row {number}" for number in range(first, first + len(rows))
    ]


def _nonempty(place: Any, rows: Rows) -> Rows:
    if not rows:
        raise ValueError(f"data file {str(place)!r} is empty; it needs at least one row")
    return rows


def _parse(text: bytes, place: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 ({error}); save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{place}: not JSON ({error}); write one JSON object, such as {{"prompt": "..."}}') from error


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f'{place}: a JSON {type(value).__name__}, not an object; write {{"prompt": "..."}}')
    return value


def _with_column(name: str | None) -> str:
    return "" if name is None else f", with a column {name!r}"


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
