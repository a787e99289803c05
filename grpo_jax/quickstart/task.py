"""The quickstart's task: column arithmetic whose carries are easy to forget. Standard library only.

A prompt asks for a sum or a difference of two three-digit numbers; a completion works from the ones column to the
hundreds column and then states the answer::

    407+385=   ->   7+5=12, 0+8+1=9, 4+3=7: 792
    402-385=   ->   12-5=7, 10-1-8=1, 4-1-3=0: 17

The shipped model was pretrained on a mixture of sound and careless workings (`Mixture`): a carry or borrow into the
next column is often forgotten, and some completions skip the working and guess. Each completion of the mixture has
the right form, so what reinforcement learning can add is correctness. The reward looks at the answer alone.

Problems belong to exactly one split, decided by a hash of the problem (`split_of`), so the prompts of the
pretraining stream, of the reinforcement learning and of the evaluation are disjoint by construction.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["pretrain", "train", "eval"]

COLUMN_COUNT = 3
SMALLEST, LARGEST = 10 ** (COLUMN_COUNT - 1), 10**COLUMN_COUNT - 1

SEPARATOR, ANSWER_MARK = ", ", ": "
PIECES = (*"0123456789", "+", "-", "=", SEPARATOR, ANSWER_MARK)
"""Every string that is one token; `PAD` and `EOS` come on top."""
PAD, EOS = "<pad>", "<eos>"

MAX_COMPLETION_TOKENS = 32
"""The longest completion of the mixture has 30 tokens, its end token included."""

_ANSWER = re.compile(r": (0|[1-9][0-9]{0,3})\Z", re.ASCII)


@dataclass(frozen=True)
class Problem:
    """`left operator right` with operands of three digits; a difference is never negative."""

    left: int
    operator: Literal["+", "-"]
    right: int

    @property
    def prompt(self) -> str:
        """The text the model continues."""
        return f"{self.left}{self.operator}{self.right}="

    @property
    def answer(self) -> str:
        """The right answer in decimal, without leading zeros."""
        return str(self.left + self.right if self.operator == "+" else self.left - self.right)


@dataclass(frozen=True)
class Mixture:
    """How careless the pretraining workings are."""

    keep_carry: float = 0.15
    """Probability that a carry or borrow reaches the next column; drawn for each one by itself."""
    guess: float = 0.15
    """Probability that the working is skipped; the guess adds or subtracts column by column and keeps no carry."""


def split_of(problem: Problem) -> Split:
    """The one split a problem belongs to: 1/16 evaluation, 1/8 reinforcement learning, the rest pretraining.

    `a+b` and `b+a` share a split, so a held-out sum has not been seen the other way round either.
    """
    first, second = problem.left, problem.right
    if problem.operator == "+":
        first, second = min(first, second), max(first, second)
    bucket = hashlib.sha256(f"{first}{problem.operator}{second}".encode()).digest()[0] % 16
    return "eval" if bucket == 0 else "train" if bucket <= 2 else "pretrain"


def problems(split: Split, rng: random.Random) -> Iterator[Problem]:
    """An endless stream of problems of `split`, drawn with replacement; sums and differences equally often."""
    while True:
        left, right = rng.randint(SMALLEST, LARGEST), rng.randint(SMALLEST, LARGEST)
        if rng.random() < 0.5:
            problem = Problem(left, "+", right)
        else:
            problem = Problem(max(left, right), "-", min(left, right))
        if split_of(problem) == split:
            yield problem


def distinct_problems(split: Split, count: int, rng: random.Random) -> list[Problem]:
    """`count` different problems of `split`, in the order in which they were first drawn."""
    found: dict[Problem, None] = {}
    stream = problems(split, rng)
    while len(found) < count:
        found[next(stream)] = None
    return list(found)


def write_working(problem: Problem, keep_carry: float, rng: random.Random) -> str:
    """A completion with its working; each carry or borrow reaches the next column with probability `keep_carry`.

    With `keep_carry` 1 the answer is right. The last column of a sum keeps its overflow.
    """
    steps, answer, carried = [], 0, False
    for column in range(COLUMN_COUNT):
        scale = 10**column
        top, bottom = problem.left // scale % 10, problem.right // scale % 10
        step, value = _add(top, bottom, carried) if problem.operator == "+" else _subtract(top, bottom, carried)
        steps.append(step)
        last = column == COLUMN_COUNT - 1
        answer += scale * (value if last else value % 10)
        carries = value > 9 if problem.operator == "+" else top - bottom - carried < 0
        carried = carries and rng.random() < keep_carry
    return SEPARATOR.join(steps) + ANSWER_MARK + str(answer)


def _add(top: int, bottom: int, carried: bool) -> tuple[str, int]:
    value = top + bottom + carried
    return f"{top}+{bottom}{'+1' if carried else ''}={value}", value


def _subtract(top: int, bottom: int, carried: bool) -> tuple[str, int]:
    """Borrows ten where the column would fall below zero."""
    if top - bottom - carried < 0:
        top += 10
    value = top - bottom - carried
    return f"{top}{'-1' if carried else ''}-{bottom}={value}", value


def write_guess(problem: Problem) -> str:
    """An answer without working, each column by itself and no carry kept."""
    return ANSWER_MARK + write_working(problem, 0.0, random.Random(0)).partition(ANSWER_MARK)[2]


def sample_completion(problem: Problem, mixture: Mixture, rng: random.Random) -> str:
    """One completion of the pretraining mixture."""
    if rng.random() < mixture.guess:
        return write_guess(problem)
    return write_working(problem, mixture.keep_carry, rng)


def parse(completion: str) -> str | None:
    """The stated answer, or None where the completion does not end in one: `: ` and up to four digits."""
    found = _ANSWER.search(completion)
    return found.group(1) if found else None


def dataset(split: Split, count: int, seed: int) -> list[dict[str, str]]:
    """`count` different rows of `split` as the shipped JSONL files hold them: a prompt and its answer."""
    found = distinct_problems(split, count, random.Random(seed))
    return [{"prompt": problem.prompt, "answer": problem.answer} for problem in found]


def pretraining_texts(mixture: Mixture, seed: int) -> Iterator[tuple[str, str]]:
    """The endless pretraining stream: (prompt, completion), of problems of the split "pretrain" alone."""
    rng = random.Random(seed)
    for problem in problems("pretrain", rng):
        yield problem.prompt, sample_completion(problem, mixture, rng)
