"""Models and datasets by hub id, from a hub that this machine imitates; no test asks the real one.

The hub's address and its offline mode are read when its packages are imported, so what is tested runs in a process
of its own.
"""

import json
import logging
import os
import subprocess
import sys

import pytest

from grpo_jax.data import load_dataset

from .hub import SHA, serve

MODEL = {
    "config.json": b'{"model_type": "qwen2"}',
    "tokenizer.json": b"{}",
    "tokenizer.model": b"x",
    "chat_template.jinja": b"{{ messages }}",
    "merges.txt": b"a b",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"a pickle",
    "optimizer.pt": b"a pickle",
    "consolidated.safetensors": b"the same again",
    "original/model.safetensors": b"the same again",
    "modeling_own.py": b"raise SystemExit",
    "README.md": b"hello",
}
ROWS = [{"question": f"{n} + 1 = ?", "answer": f"#### {n + 1}"} for n in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CARD = b"""---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train.jsonl}
  - {split: test, path: main/test.jsonl}
- config_name: other
  data_files:
  - {split: train, path: other.jsonl}
---
"""
REPOSITORIES = {
    "models/owner/model": MODEL,
    "models/owner/gated": MODEL,
    "datasets/owner/maths": {
        "README.md": CARD,
        "main/train.jsonl": LINES,
        "main/test.jsonl": LINES.splitlines(True)[0],
        "other.jsonl": LINES,
    },
    "datasets/owner/single": {"train.jsonl": LINES},
}
SCRIPT = """
import json, sys
from grpo_jax.data import load_dataset, resolve_model
said = []
for kind, arguments in json.load(sys.stdin):
    try:
        if kind == "model":
            path = resolve_model(*arguments)
            said.append([path.name, sorted(str(f.relative_to(path)) for f in path.rglob("*"))])
        else:
            said.append(load_dataset(arguments[0], prompt_column="question"))
    except ValueError as error:
        said.append(str(error))
print(json.dumps(said))
"""


def ask(home, calls, **environment):
    """What each call gave, or its error."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    clean |= {"HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps(calls), capture_output=True, text=True, env=clean | environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


WANTED = ["chat_template.jinja", "config.json", "merges.txt", "model.safetensors", "tokenizer.json", "tokenizer.model"]


def test_models_by_hub_id_then_offline_from_the_cache(home):
    model, other = ("model", ["owner/model"]), ("model", ["owner/absent"])
    with serve(REPOSITORIES, gated=["owner/gated"]) as (address, asked):
        said = ask(
            home,
            [
                model,
                ("model", ["owner/model", SHA]),
                other,
                ("model", ["owner/model", "v9"]),
                ("model", ["owner/gated"]),
            ],
            HF_ENDPOINT=address,
        )
    assert said[0] == said[1] == [SHA, WANTED]
    assert not any(path.endswith((".bin", ".pt", ".py")) for path in asked)
    for error, says in zip(
        said[2:],
        [
            "model.path: 'owner/absent' is no directory here, and the hub has none of that name",
            "model.path: 'owner/model' is no directory here, and on the hub it has no revision 'v9'",
            "model.path: 'owner/gated' is no directory here, and on the hub it is gated: accept its terms",
        ],
        strict=True,
    ):
        assert error.startswith(says) and "\n" not in error
    said = ask(home, [model, other], HF_HUB_OFFLINE="1")
    assert said[0] == [SHA, WANTED]
    assert said[1].startswith(
        "model.path: 'owner/absent' is no directory here, and it is not in the hub's cache, while"
    )
    said = ask(home, [model, other], HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert said[0] == [SHA, WANTED], "the cache serves when the hub cannot be reached"
    assert "http://127.0.0.1:9 cannot be reached; check the network" in said[1]


@pytest.mark.slow
def test_datasets_by_hub_id(home):
    pytest.importorskip("datasets")
    names = ["owner/maths/main:train", "owner/maths/main:test", "owner/maths/main:train[1:]", "owner/maths/other"]
    wrong = ["owner/maths/main", "owner/maths/main:validation", "owner/maths/none:train", "owner/absent:train"]
    with serve(REPOSITORIES) as (address, _):
        said = ask(home, [("data", [name]) for name in [*names, "owner/single", *wrong]], HF_ENDPOINT=address)
    assert said[:5] == [ROWS, ROWS[:1], ROWS[1:], ROWS, ROWS]
    for error, says in zip(
        said[5:],
        [
            "dataset 'owner/maths' has splits ['train', 'test']; name one, as owner/maths/main:train",
            "dataset 'owner/maths' is no file here, and the hub did not give it (ValueError: Unknown split",
            "dataset 'owner/maths' is no file here, and the hub did not give it (ValueError: BuilderConfig 'none' not",
            "dataset 'owner/absent' is no file here, and the hub did not give it (DatasetNotFoundError: Dataset",
        ],
        strict=True,
    ):
        assert error.startswith(says) and "\n" not in error
    said = ask(home, [("data", [name]) for name in (names[0], "owner/absent:train", wrong[1])], HF_HUB_OFFLINE="1")
    assert said[0] == ROWS
    assert said[1].startswith(
        "dataset 'owner/absent' is no file here, and it is not in the hub's cache, while HF_HUB_OFF"
    )
    assert "Unknown split" in said[2]


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("owner/maths/main:train[1:]", ("owner/maths", "main", "train[1:]")),
        ("owner/maths/other", ("owner/maths", "other", None)),
        ("owner/single:test", ("owner/single", None, "test")),
    ],
)
def test_a_hub_dataset_is_asked_for_by_its_parts(monkeypatch, name, asked):
    datasets, seen = pytest.importorskip("datasets"), []

    def load(path, name=None, *, split=None, **_):
        seen.append((path, name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_dataset(name, prompt_column="question") == ROWS and seen == [asked]


def test_a_hub_out_of_reach_is_told_of_once(monkeypatch, caplog):
    datasets, log = pytest.importorskip("datasets"), logging.getLogger("huggingface_hub.utils._http")

    def unreachable(*_, **__):
        log.warning("Retrying in 1s [Retry 1/5].")
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match="'owner/name' is no file here, and .* cannot be reached; check the network"):
        load_dataset("owner/name:train", prompt_column="question")
    assert not caplog.records
    log.warning("what somebody else asks of it")
    assert [record.message for record in caplog.records] == ["what somebody else asks of it"]
