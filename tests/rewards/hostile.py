"""Rewards that misbehave on purpose, for test_pool.py; a completion says what is to happen."""

import asyncio
import ctypes
import math
import os
import re
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

CALLS: list[int] = []


def obey(completions, **columns):
    """Length of each completion, unless it is an order."""
    return [_one(text) for text in completions]


def _one(text):
    if text == "spin":
        while True:
            pass
    if text == "regex":
        return float(bool(re.match(r"(a+)+$", "a" * 60 + "b")))
    if text == "sleep":
        time.sleep(3600)
    if text == "exit":
        os._exit(7)
    if text == "segfault":
        ctypes.string_at(0)
    if text == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if text == "memory":
        return float(len(bytearray(4 * 2**30)))
    if text == "swallow":
        while True:
            try:
                while True:
                    pass
            except BaseException:
                pass
    if text == "print":
        print('{"rewards": [99.0]}', flush=True)
        os.write(1, b'{"rewards": [99.0]}\n')
        subprocess.run([sys.executable, "-c", "print('{\"rewards\": [99.0]}')"], check=True)
    if text == "read":
        return float(len(sys.stdin.read()))
    return float(len(text))


def answers(completions, given, **columns):
    """What the column says, made by name, since JSON cannot carry all of it."""
    special = {
        "inf": math.inf,
        "-inf": -math.inf,
        "nan": math.nan,
        "huge": 10**400,
        "large": 1e39,
        "fraction": Fraction(1, 4),
    }
    return [special.get(value, value) if isinstance(value, str) else value for value in given]


def wrong_length(completions, **columns):
    return [0.0] * (len(completions) + 1)


def text(completions, **columns):
    return "1" * len(completions)


def nothing(completions, **columns):
    return None


def generator(completions, **columns):
    return (float(len(text)) for text in completions)


def divides(completions, **columns):
    return [1.0 / (len(text) - 3) for text in completions]


class Quits(BaseException):
    """Not an Exception."""


def quits(completions, how, **columns):
    raises = {
        "quits": Quits("enough"),
        "exit": SystemExit(3),
        "interrupt": KeyboardInterrupt(),
        "cancel": asyncio.CancelledError(),
    }
    for order in how:
        if order in raises:
            raise raises[order]
    return [1.0] * len(completions)


async def waits(completions, **columns):
    await asyncio.sleep(0.01)
    return [float(len(text)) for text in completions]


async def same_loop(completions, **columns):
    CALLS.append(id(asyncio.get_running_loop()))
    return [float(len(set(CALLS)))] * len(completions)


def process_id(completions, **columns):
    return [float(os.getpid())] * len(completions)


def meets_others(completions, **columns):
    """1 once ``count`` processes are in here at the same time; they find each other by files in ``place``."""
    place = Path(columns["place"][0])
    (place / str(os.getpid())).touch()
    while len(list(place.iterdir())) < columns["count"][0]:
        time.sleep(0.01)
    return [1.0] * len(completions)


def slow_for_many(completions, **columns):
    """More than seven rows take it for ever."""
    if len(completions) > 7:
        time.sleep(3600)
    return [1.0] * len(completions)


def leaves_a_child(completions, **columns):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(columns["path"][0], "w") as file:
        file.write(str(child.pid))
    while True:
        pass


def columns_back(prompts, completions, completion_ids, *, number, **columns):
    same = [
        prompt == text and sum(ids) == n
        for prompt, text, ids, n in zip(prompts, completions, completion_ids, number, strict=True)
    ]
    return [float(ok) for ok in same]


def logs(completions, log_extra, log_metric, trainer_state, *, unit=1.0, **columns):
    """Logs what it was handed; an order in a completion makes it log wrongly."""
    log_extra("size", [len(text) for text in completions])
    for text in completions:
        log_extra("odd", [{"mark": text, "of": {1j}, "share": float("nan")}])
        log_metric("seen", len(completions))
    if "short" in completions:
        log_extra("size", [0])
    if "words" in completions:
        log_metric("seen", "many")
    if "flood" in completions:
        log_extra("flood", ["x" * 5_000_000] * len(completions))
    if "exit" in completions:
        os._exit(7)
    done = trainer_state.global_step / trainer_state.max_steps
    return [unit * done] * len(completions)


def takes_little(completions, answer):
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def takes_options(completions, *, size, scale=1.0, **columns):
    return [scale * (len(text) == size) for text in completions]
