"""Where rows come from, and what is said when they do not."""

import csv
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_jax.data import PromptSet, decode, describe, load_dataset, load_tokenizer, resolve_model
from grpo_jax.data.places import SHIPPED, shipped
from grpo_jax.data.sources import check_rows

ROWS = [
    {"prompt": "1 + 1", "answer": "2"},
    {"prompt": "é\u2028🦀, \"quoted\"\nand a second line", "answer": ""},
    {"prompt": "x", "answer": "none"},
]  # fmt: skip
MESSAGES = [
    {"prompt": [{"role": "user", "content": "hi"}], "answer": None, "numbers": [1, 2]},
    {"prompt": [{"role": "system", "content": "be"}, {"role": "user", "content": "yo"}], "answer": "a", "numbers": []},
]


def write(file, rows):
    if file.suffix == ".json":
        file.write_text(json.dumps(rows, indent=1))
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix == ".csv":
        with file.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        importlib.import_module("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), file)
    return file


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet", ".JSONL"])
def test_rows_come_back_as_they_were_written(tmp_path, ending):
    file = write(tmp_path / f"rows{ending.lower()}", ROWS).rename(tmp_path / f"rows{ending}")
    assert load_dataset(file) == load_dataset(str(file)) == ROWS


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_messages_and_lists_come_back_too(tmp_path, ending):
    assert load_dataset(write(tmp_path / f"rows{ending}", MESSAGES)) == MESSAGES


def test_json_lines_as_windows_and_others_write_them(tmp_path):
    rows = [{"prompt": "1 + 1", "answer": "2"}, {"answer": None, "prompt": [{"role": "user", "content": "é\u2028🦀"}]}]
    text = "\ufeff" + json.dumps(rows[0]) + "\r\n\n  \n" + json.dumps(rows[1], ensure_ascii=False)
    for name in ("rows.jsonl", "rows.json"):  # json lines are often named so
        (tmp_path / name).write_bytes(text.encode())
        assert load_dataset(tmp_path / name) == rows


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", None, r"data file '.*a.jsonl' does not exist \(looked from .*give a .jsonl"),
        ("a.txt", b"x", "its ending is '.txt', and read are .jsonl, .json, .csv, .parquet"),
        ("a.jsonl", b"", "is empty; it needs one JSON object a line"),
        ("a.jsonl", b"\n  \n", "is empty"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2: not JSON"),
        ("a.jsonl", b'\n\n{"prompt": "a"}\n["a"]\n', "line 4: a JSON list, not an object"),
        ("a.jsonl", b'{"prompt": "a"}\n"a"\n', "line 2: a JSON str, not an object"),
        ("a.jsonl", b'{"prompt": "\xff"}\n', "line 1: not UTF-8"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        (
            "a.jsonl",
            b'{"question": "a", "answer": 1}\n',
            r"line 1: no column 'prompt', it has \['answer', 'question'\]",
        ),
        ("a.jsonl", b'{"prompt": "a"}\n{"question": "a"}\n', r"line 2: no column 'prompt', it has \['question'\]"),
        ("a.jsonl", b'{"prompt": "a", "x": 1}\n{"prompt": "a", "y": 1}\n', r"line 2: .*missing \['x'\], extra \['y'\]"),
        ("a.json", b"[]", "is empty; it needs at least one row"),
        ("a.json", b"", "is empty"),
        ("a.json", b'[{"prompt": "a"}, 3]', "a.json, row 2: a JSON int, not an object"),
        ("a.json", b"[1,", "a.json: not JSON"),
        ("a.csv", b"", "is empty"),
        ("a.csv", b"prompt,answer\r\n", "is empty"),
        ("a.csv", b"prompt,answer\r\na,b\r\na,b,c\r\n", "a.csv, line 3: 3 fields, but the header has 2"),
        ("a.csv", b'prompt,answer\r\n"a\r\nb",c\r\n\r\na\r\n', "a.csv, line 5: 1 fields"),
        ("a.csv", b"prompt,prompt\r\na,b\r\n", "repeat a name"),
        ("a.csv", b'prompt\r\n"a"b\r\n', "not CSV"),
        ("a.csv", b"prompt\r\n\xff\r\n", "not UTF-8"),
        ("a.csv", b"question\r\na\r\n", r"line 2: no column 'prompt', it has \['question'\]"),
        ("a.parquet", b"PAR1", "not Parquet"),
    ],
)
def test_files_that_cannot_be_read_say_where_and_why_in_one_line(tmp_path, name, content, says):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        load_dataset(file)
    assert "\n" not in str(caught.value)


def test_another_column_and_other_names(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"question": "a", "solution": "b", "prompt": "c"}])
    assert load_dataset(file, prompt_column="question") == [{"question": "a", "solution": "b", "prompt": "c"}]
    names = {"prompt": "raw", "question": "prompt", "solution": "answer"}
    assert load_dataset(file, rename_columns=names) == [{"prompt": "a", "answer": "b", "raw": "c"}]
    assert load_dataset(file, rename_columns={"other": "answer"}) == load_dataset(file)
    with pytest.raises(ValueError, match="data.rename_columns makes 'question' 'prompt', which is there"):
        load_dataset(file, rename_columns={"question": "prompt"})
    assert load_dataset([{"a": 1}], prompt_column=None) == [{"a": 1}]


def test_rows_given_as_objects_are_checked_too():
    assert load_dataset(row for row in ROWS) == ROWS
    for rows, says in [
        ([], "got no rows"),
        ([{"prompt": "a"}, {"text": "a"}], "row 1: no column 'prompt'"),
        (["a"], "row 0: a str, not a mapping"),
        ({"train": ROWS, "test": ROWS}, r"data.train: got splits \['train', 'test'\]"),
        (3, "data.train: got a int, which holds no rows"),
    ]:
        with pytest.raises(ValueError, match=says):
            load_dataset(rows)
    with pytest.raises(ValueError, match="got no rows"):
        check_rows([])


def test_what_the_record_says_of_a_source():
    sources = ["a.jsonl", Path("b.csv"), ROWS, None, {"x": Path("c"), "y": ROWS}, iter(ROWS)]
    assert [describe(source) for source in sources] == [
        "a.jsonl",
        "b.csv",
        "<3 rows>",
        None,
        {"x": "c", "y": "<3 rows>"},
        "<rows>",
    ]


def test_objects_and_directories_of_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(MESSAGES)
    assert load_dataset(table) == MESSAGES and describe(table) == "<2 rows>"
    table.save_to_disk(tmp_path / "one")
    assert load_dataset(tmp_path / "one") == MESSAGES
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "several")
    assert load_dataset(tmp_path / "several" / "test") == MESSAGES
    (tmp_path / "other").mkdir()
    for name, says in [("several", r"holds splits \['test', 'train'\]"), ("other", "holds no dataset; give a .jsonl")]:
        with pytest.raises(ValueError, match=says):
            load_dataset(tmp_path / name)
    for broken in (tmp_path / "one").glob("*.arrow"):
        broken.write_bytes(b"x")
    with pytest.raises(ValueError, match="one': not readable .*save it again"):
        load_dataset(tmp_path / "one")


@pytest.mark.parametrize(("package", "source"), [("pyarrow", "a.parquet"), ("datasets", "owner/name")])
def test_without_the_extra(tmp_path, monkeypatch, package, source):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=r"needs the extra `data`: pip install 'grpo_jax\[data\]'"):
        load_dataset(source)


@pytest.mark.parametrize(
    "name",
    ["./o/name", "../o/name", "/o/name", "~/o/name", "name", "a/b/c/d", "o/name.csv", "o/name.jsonl", "o\\name"],
)
def test_what_looks_like_a_path_is_never_looked_up(monkeypatch, name):
    for package in ("datasets", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match="does not exist .looked from"):
        load_dataset(name)
    with pytest.raises(ValueError, match="model.path: directory .* does not exist .looked from") as caught:
        resolve_model(name)
    assert "\n" not in str(caught.value)


def test_a_model_by_its_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "weights.bin").touch()
    with pytest.raises(ValueError, match="model.path: 'org/name' is no checkpoint: it holds weights.bin; give"):
        resolve_model("org/name")
    for place in (tmp_path / "org" / "name", tmp_path):
        (place / "config.json").touch()
    assert resolve_model("org/name") == Path("org/name") and resolve_model(tmp_path) == tmp_path
    with pytest.raises(ValueError, match="model.revision: got 'main', but 'org/name' is a directory"):
        resolve_model("org/name", "main")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="model.path: .* is a file; give the directory"):
        resolve_model("model.safetensors")


def test_quickstart_is_what_the_package_ships(monkeypatch):
    tokenizer = load_tokenizer(resolve_model("quickstart"))
    for kind in ("train", "eval"):
        held_out = PromptSet(load_dataset("quickstart", kind=kind), tokenizer)
        assert len(held_out) > 100 and all("answer" in prompt.columns for prompt in held_out.prompts)
        assert decode(tokenizer, held_out.prompts[0].tokens) == held_out.prompts[0].text
    monkeypatch.setitem(SHIPPED, "eval", "absent.jsonl")
    with pytest.raises(ValueError, match="absent.jsonl is not there; install grpo_jax again"):
        shipped("eval")


def test_transformers_says_nothing_of_a_missing_torch():
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from grpo_jax.data import load_tokenizer, resolve_model\n"
        "load_tokenizer(resolve_model('quickstart'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_NO_ADVISORY_WARNINGS"}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
