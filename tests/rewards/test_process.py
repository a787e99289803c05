"""A worker's surroundings: what it imports, what it is told, what it starts, and whose answer an answer is."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.rewards import RewardPool
from grpo_jax.rewards.surroundings import ROOT, environment_for, import_path, withheld

from .test_limits import gone

linux = pytest.mark.skipif(sys.platform != "linux", reason="keepers are of Linux")


def own(tmp_path, code, name="own"):
    (tmp_path / f"{name}.py").write_text(code)
    return f"{tmp_path / name}.py:f"


def score(pool, completions, **columns):
    return pool.score(completions, completions, [[1]] * len(completions), columns)


FORKS = """
import os, sys, time
def f(completions, **columns):
    if "bad" in completions and os.fork() == 0:
        time.sleep(0.2)
        open(columns["note"][0], "w").close()
        return [999.0] * len(completions)
    return [float(len(text)) for text in completions]
"""


def test_a_fork_that_comes_back_answers_nothing(tmp_path):
    note = tmp_path / "note"
    with RewardPool([own(tmp_path, FORKS)]) as pool:
        assert score(pool, ["a", "bad"], note=[str(note)] * 2).rewards.tolist() == [[1, 3]]
        while not note.exists():
            time.sleep(0.01)
        for _ in range(3):
            assert score(pool, ["cc", "dddd"]).rewards.tolist() == [[2, 4]]


LATE = """
import json, os, threading, gc, io
def f(completions, **columns):
    if completions[0] == "late":  # an answer to another request lies in the pipe before the own one
        pipe = next(o for o in gc.get_objects() if type(o).__name__ == "Pipes")
        pipe.answer(b"1", {"rewards": [999.0] * 9, "extra": {}, "metrics": {}})
    return [float(len(text)) for text in completions]
"""


def test_an_answer_to_another_request_is_none(tmp_path):
    with RewardPool([own(tmp_path, LATE)]) as pool:
        assert score(pool, ["late"]).rewards.tolist() == [[4]]
        assert score(pool, ["ab"]).rewards.tolist() == [[2]]


def test_secrets_stay_here_unless_they_are_given():
    told = {"PATH": "/bin", "HOME": "/root", "PWD": "/", "LANG": "C", "HF_HOME": "/hub", "TOKENIZERS_PARALLELISM": "1"}
    told |= {"CUDA_VISIBLE_DEVICES": "0", "http_proxy": "http://host:3128", "KEYBOARD": "us", "MONKEY": "1"}
    secret = ["HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "PGPASSWORD"]
    secret += ["GITHUB_PAT", "SSH_AUTH_SOCK", "GOOGLE_APPLICATION_CREDENTIALS", "my_token", "MYSQL_PWD", "APIKEY"]
    environment = told | dict.fromkeys(secret, "x") | {"DATABASE_URL": "postgres://me:word@host/db"}
    assert withheld(environment) == [*secret, "DATABASE_URL"]
    assert withheld(environment, ["OPENAI_API_KEY", "PATH"]) == [n for n in withheld(environment) if n[:6] != "OPENAI"]
    made = environment_for(environment | {"OMP_NUM_THREADS": "4"}, ["HF_TOKEN"])
    assert told.items() <= made.items() and made["HF_TOKEN"] == "x" and "my_token" not in made
    assert made["OMP_NUM_THREADS"] == "4" and made["OPENBLAS_NUM_THREADS"] == "1"


ENVIRONMENT = """
import os
def f(completions, **columns):
    os.environ["JUDGE_API_KEY"]
    return [float("OPENBLAS_NUM_THREADS" in os.environ)]
"""


def test_a_reward_that_lacks_its_key_says_what_gives_it(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "x")
    spec = own(tmp_path, ENVIRONMENT)
    says = (
        "raised KeyError: 'JUDGE_API_KEY'.*a reward's process does not get JUDGE_API_KEY.*reward.environment gives it"
    )
    with RewardPool([spec]) as pool, pytest.raises(ValueError, match=says):
        score(pool, ["a"])
    with RewardPool([spec], environment=["JUDGE_API_KEY"]) as pool:
        assert score(pool, ["a"]).rewards.tolist() == [[1]]


def test_a_library_comes_before_what_lies_around(monkeypatch, tmp_path):
    script, library = tmp_path / "scripts", tmp_path / "site"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script / "train.py"), raising=False)
    monkeypatch.setattr(sys, "path", [str(script), "", str(ROOT / "scripts"), str(library), "/lib/python"])
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert import_path() == [str(library), "/lib/python", str(script), str(tmp_path), str(ROOT)]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}")
    assert import_path() == [str(tmp_path), str(library), "/lib/python", str(script), str(ROOT)]


def test_files_of_the_working_directory_do_not_hide_pythons_modules(tmp_path, monkeypatch):
    for name in ("numbers", "json", "struct", "resource", "selectors"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the file of the project')")
    monkeypatch.chdir(tmp_path)
    spec = own(
        tmp_path, "import numbers\ndef f(completions, **columns): return [float(issubclass(int, numbers.Number))]"
    )
    with RewardPool([spec, "exact_match"]) as pool:
        assert score(pool, ["4"], answer=["4"]).rewards.tolist() == [[1], [1]]


POOL = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
def length(text):
    return float(len(text))
def f(completions, how, **columns):
    with ProcessPoolExecutor(2, multiprocessing.get_context(how[0])) as pool:
        return list(pool.map(length, completions))
"""


@pytest.mark.parametrize("how", ["fork", pytest.param("spawn", marks=pytest.mark.slow), "forkserver"])
def test_a_rewards_own_process_pool_works(tmp_path, how):
    with RewardPool([own(tmp_path, POOL, "json")], 60.0) as pool:  # its module's name hides no library
        assert score(pool, ["a", "bcd"], how=[how] * 2).rewards.tolist() == [[1, 3]]


@pytest.mark.parametrize("how", ["spawn", "forkserver"])
def test_a_pool_that_each_of_its_processes_would_make_again_is_refused_at_once(tmp_path, how):
    with pytest.raises(ValueError, match="'f': starts a process under spawn .* at its first call"):
        RewardPool(
            [own(tmp_path, f"from multiprocessing import get_context\nP = get_context({how!r}).Pool(1)\nf = len")]
        )


LEAVES = """
import subprocess, sys, time
from pathlib import Path
def f(completions, note, **columns):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    Path(note[0]).write_text(str(child.pid))
    if completions[0] == "hang":
        time.sleep(600)
    return [1.0]
"""


@linux
@pytest.mark.parametrize("how", ["close", "hang"])
def test_what_left_the_group_of_its_reward_dies_with_it_too(tmp_path, how):
    note = tmp_path / "pid"
    with RewardPool([own(tmp_path, LEAVES)], 1.0) as pool:
        assert score(pool, [how], note=[str(note)]).timeout_counts == (int(how == "hang"),)
    assert gone(int(note.read_text()))


ORPHAN = """
import sys
from grpo_jax.rewards import RewardPool
pool = RewardPool([sys.argv[1]], 600.0)
pool.score(["a"], ["a"], [[1]], {"note": [sys.argv[2]]})
print("there", flush=True)
sys.stdin.read()
"""


@linux
def test_what_a_reward_started_does_not_outlive_a_run_killed_with_9(tmp_path):
    command = [sys.executable, "-c", ORPHAN, own(tmp_path, LEAVES), str(tmp_path / "pid")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "there\n"
        os.kill(parent.pid, signal.SIGKILL)
    assert gone(int((tmp_path / "pid").read_text()))


FAMILY = """
import multiprocessing, time
def hold():
    block = bytearray(60 * 2**20)
    time.sleep(600)
def f(completions, **columns):
    block = bytearray(100 * 2**20)
    if completions[0] == "many":
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=hold if n else time.sleep, args=() if n else (1,)) for n in range(4)]
    else:  # they share the block with this one
        processes = [multiprocessing.get_context("fork").Process(target=time.sleep, args=(0.3,)) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [1.0]
"""


@linux
def test_the_memory_limit_is_for_all_of_a_rewards_processes_together(tmp_path):
    with RewardPool([own(tmp_path, FAMILY)], 60.0, memory_limit_mb=200) as pool:
        scores = score(pool, ["many"])
        assert scores.crash_counts == (1,)
        assert scores.warnings == ("reward 'f', row 0: its process ran out of its memory of 200 MB, not scored",)
        assert score(pool, ["shared"]).rewards.tolist() == [[1]]


def test_address_space_is_not_memory(tmp_path):
    code = "import mmap\nROOM = mmap.mmap(-1, 8 * 2**30)\ndef f(completions, **columns): return [1.0]"
    with RewardPool([own(tmp_path, code)], memory_limit_mb=256) as pool:
        assert score(pool, ["a"]).rewards.tolist() == [[1]]


def test_several_workers_of_a_function_work_at_the_same_time(tmp_path):
    spec = f"{Path(__file__).with_name('hostile.py')}:meets_others"
    with RewardPool([spec], 120.0, workers=3) as pool:  # one after the other they would wait for ever
        scores = score(pool, ["a"] * 40, place=[str(tmp_path)] * 40, count=[3] * 40)
    np.testing.assert_array_equal(scores.rewards, np.ones((1, 40)))
    for count in (0, 10**9):
        with pytest.raises(ValueError, match=f"reward.workers: got {count}"):
            RewardPool(["exact_match"], workers=count)


def test_a_limit_may_be_longer_than_systems_can_wait():
    with RewardPool(["exact_match"], 1e300) as pool:
        assert score(pool, ["4"], answer=["4"]).rewards.tolist() == [[1]]
