"""What the tests themselves stand on: the compilation cache they share, and the account of where their time goes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import compile_cache
import pytest
from jax._src import lru_cache

ROOT = Path(__file__).parent.parent


def test_programs_are_written_beside_their_place_and_renamed(tmp_path, monkeypatch):
    cache = lru_cache.LRUCache(str(tmp_path), max_size=-1)
    cache.put("whole", b"program")
    assert cache.get("whole") == b"program" and [path.name for path in tmp_path.iterdir()] == ["whole-cache"]
    write = Path.write_bytes

    def killed(self: Path, value: bytes) -> int:
        write(self, value[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        cache.put("half", b"program")
    assert cache.get("half") is None

    def full(self: Path, value: bytes) -> int:
        write(self, value[:3])
        raise OSError("no space")

    monkeypatch.setattr(Path, "write_bytes", full)
    cache.put("full", b"program")
    assert cache.get("full") is None and not list(tmp_path.glob("full*"))


def test_each_set_of_flags_has_a_folder_and_a_given_one_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    places = set()
    for flags in ("--xla_a", "--xla_b", "--xla_a"):
        monkeypatch.setenv("XLA_FLAGS", flags)
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        compile_cache.configure()
        places.add(os.environ["JAX_COMPILATION_CACHE_DIR"])
    assert len(places) == 2 and all(Path(place).is_dir() for place in places)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    compile_cache.configure()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "mine"


def test_what_was_written_longest_ago_is_deleted_first(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "MAX_BYTES", 25)
    for age, name in enumerate(("new", "old", "older", "oldest")):
        (tmp_path / name).write_bytes(b"0123456789")
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    compile_cache.prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


TESTS = """
import subprocess, sys, time
import jax, jax.numpy as jnp
def test_compiles(): assert float(jax.jit(lambda x: x * 3 + 1)(jnp.float32(2))) == 7
def test_sleeps(): time.sleep(0.01)
def test_starts(): assert subprocess.run([sys.executable, "-S", "-c", ""]).returncode == 0
def test_fails(): assert False
"""


@pytest.mark.slow
def test_each_test_says_where_its_time_went(tmp_path):
    """In two processes, as one: what each did is counted as its own, and the script adds it up."""
    for name in ("conftest.py", "durations.py", "compile_cache.py"):
        (tmp_path / name).write_text((ROOT / "tests" / name).read_text())
    (tmp_path / "test_made.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-n", "2", "test_made.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "1 failed, 3 passed" in done.stdout, done.stdout + done.stderr
    measured = tmp_path / ".pytest_cache/d/durations/tests.jsonl"
    rows = {row["test"].split("::")[1]: row for row in map(json.loads, measured.read_text().splitlines())}
    assert rows["test_compiles"]["programs"] > 0 < rows["test_compiles"]["compile"] <= rows["test_compiles"]["wall"]
    assert rows["test_sleeps"]["sleep"] >= 0.01 and rows["test_starts"]["processes"] == 1
    assert rows["test_starts"]["process"] > 0 and rows["test_fails"]["outcome"] == "failed"
    command = [sys.executable, str(ROOT / "scripts/show_durations.py"), "--file", str(measured)]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert "4 tests" in shown and "test_made.py::test_sleeps" in shown and "| sleep |" in shown
