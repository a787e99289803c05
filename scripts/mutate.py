"""Plant one mistake at a time in a copy of grpo_jax and see that the test its row of mutants.toml names fails.

    python scripts/mutate.py                          # all of them
    python scripts/mutate.py --only losses "geo_gate" # those whose file or name holds one of the words
    python scripts/mutate.py --changed --daily 10     # those whose file, test or row changed, and ten by the date
    python scripts/mutate.py --changed --most 60      # of them at most 60, other ones every day
    python scripts/mutate.py --check                  # only see that each can be planted and names a test
    python scripts/mutate.py --find                   # of a row whose test does not catch it: which of its part does

First all the named tests are run on the sound code, where they must pass and be in the fast set. Caught means: the
test ran and failed, by another error than one of importing. Each process works in a copy of its own; programs that a
mistake leaves as they are come from the tests' compilation cache (tests/compile_cache.py).
"""

import argparse
import datetime
import hashlib
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
TABLE = "scripts/mutants.toml"
FOLDERS = ("grpo_jax", "tests", "scripts", "docs", "configs")
NO_KILL = re.compile(r"(ImportError|ModuleNotFoundError|SyntaxError|IndentationError|NameError)\b")
"""Errors of a mistake that is no plausible one, because the code can't even be loaded or read."""
HUNG = 900
"""Seconds for each test that is asked for, after which they have hung, which is no verdict."""


class Mutant(NamedTuple):
    """A mistake: in `file` of grpo_jax, `old`, which occurs once, becomes `new`; `test` catches it."""

    name: str
    file: str
    old: str
    new: str
    test: str = ""


class Case(NamedTuple):
    """How a test ended: "passed", "failed", or "error" where it did not get so far; and with which message."""

    test: str
    end: str
    message: str
    seconds: float


def read_table(text: str | None = None) -> list[Mutant]:
    """The mutants of the table, or of another version's text of it."""
    text = (ROOT / TABLE).read_text(encoding="utf-8") if text is None else text
    return [Mutant(**row) for row in tomllib.loads(text)["mutant"]]


def problems(mutants: Sequence[Mutant]) -> list[str]:
    """What is wrong with rows: a text that does not occur once, a test that is not there, a name given twice."""
    found = []
    names = [mutant.name for mutant in mutants]
    for mutant in mutants:
        path, (file, _, name) = ROOT / "grpo_jax" / mutant.file, mutant.test.partition("::")
        count = path.read_text(encoding="utf-8").count(mutant.old) if path.is_file() else 0
        if count != 1 or mutant.old == mutant.new:
            found.append(f"{mutant.name}: {mutant.file} holds its text {count} times, not once; write it anew")
        if names.count(mutant.name) > 1:
            found.append(f"{mutant.name}: the name is given twice; name one otherwise")
        source = (ROOT / file).read_text(encoding="utf-8") if file and (ROOT / file).is_file() else ""
        if not re.search(rf"^def {re.escape(name.partition('[')[0])}\(", source, re.MULTILINE):
            found.append(f"{mutant.name}: there is no test {mutant.test!r}; name another (--find looks for one)")
    return found


def changed(mutants: Sequence[Mutant], revision: str) -> list[Mutant]:
    """Those whose file, test or row is another than at a revision."""
    tracked, new = git("diff", "--name-only", revision), git("ls-files", "--others", "--exclude-standard")
    files = {*tracked.splitlines(), *new.splitlines()}
    try:
        before = set(read_table(git("show", f"{revision}:{TABLE}")))
    except (RuntimeError, TypeError):  # no table there, or one of other columns
        before = set()
    return [m for m in mutants if {f"grpo_jax/{m.file}", m.test.partition("::")[0]} & files or m not in before]


def default_revision() -> str:
    """Where this branch left origin/main; on it, or without it, the last commit before the last day's."""
    try:
        base = git("merge-base", "HEAD", "origin/main")
    except RuntimeError:
        base = ""
    if base and base != git("rev-parse", "HEAD"):
        return base
    yesterday = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)).isoformat()
    return (
        git("rev-list", "-1", f"--before={yesterday}", "HEAD") or git("rev-list", "--max-parents=0", "HEAD").split()[0]
    )


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"git {' '.join(words)} failed, and says what changed: {done.stderr.strip()}")
    return done.stdout.strip()


def of_the_day(mutants: Sequence[Mutant], count: int, day: int, but: Sequence[Mutant] = ()) -> list[Mutant]:
    """So many of them, others every day, until after len / count days all had their turn; none of ``but``."""
    order = sorted(mutants, key=lambda mutant: hashlib.sha256(mutant.name.encode()).digest())
    first = day * count % max(len(order), 1)
    return [mutant for mutant in order[first:] + order[:first] if mutant not in but][:count]


def make_copy(work: Path) -> Path:
    """Copy the package and its tests, and see that the copy is what gets imported."""
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, work / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy(file, work)
    command = [sys.executable, "-c", "import grpo_jax; print(grpo_jax.__file__)"]
    found = subprocess.run(command, cwd=work, env=environment(work), capture_output=True, text=True, check=True).stdout
    if not found.startswith(str(work)):
        raise RuntimeError(f"the copy is not what is imported: {found}")
    return work


def environment(work: Path) -> dict[str, str]:
    # Without bytecode: Python would take that of another mistake of the same second and length for this one's.
    return os.environ | {"PYTHONPATH": str(work), "PYTHONDONTWRITEBYTECODE": "1"}


def pytest(work: Path, tests: Sequence[str], *options: str) -> list[Case]:
    """Run tests against a copy; how each that ran ended.

    Raises:
        RuntimeError: no verdict: they can't be collected, are not in the fast set, hang, or end the process.
    """
    report = work / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--no-header", "--tb=short", *options, *tests]
    command += ["-o", "junit_family=xunit1", f"--junitxml={report}"]  # of the old kind, which says the file
    limit = HUNG * len(tests)
    try:
        done = subprocess.run(command, cwd=work, env=environment(work), capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"hung for {limit} s") from error
    if done.returncode not in (0, 1) or not report.exists():
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-1000:]}")
    return [_case(node) for node in ElementTree.parse(report).iter("testcase")]


def _case(node: ElementTree.Element) -> Case:
    ends = {"failure": "failed", "error": "error", "skipped": "skipped"}
    child = next((child for child in node if child.tag in ends), None)
    end, message = ("passed", "") if child is None else (ends[child.tag], child.get("message", ""))
    return Case(f"{node.get('file')}::{node.get('name')}", end, message, float(node.get("time", 0)))


def check_sound(work: Path, tests: Sequence[str], jobs: int) -> None:
    """Run the named tests on the sound code.

    Raises:
        RuntimeError: one that does not pass, is skipped or is not in the fast set.
    """
    cases = pytest(work, tests, "-n", str(jobs))
    wrong = [f"{case.test}: {case.end} {case.message}" for case in cases if case.end != "passed"]
    ran = {name for case in cases for name in (case.test, case.test.partition("[")[0])}
    wrong += [f"{test}: did not run; is it marked slow?" for test in tests if test not in ran]
    if wrong:
        raise RuntimeError("without a mistake these must pass, in the fast set:\n" + "\n".join(wrong))


def plant(mutant: Mutant, work: Path, tests: Sequence[str], *options: str) -> list[Case]:
    """The tests that catch the mistake, the quickest first.

    Raises:
        RuntimeError: no verdict.
    """
    path = work / "grpo_jax" / mutant.file
    sound = path.read_text(encoding="utf-8")
    path.write_text(sound.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        cases = pytest(work, tests, "-n", "0", *options)
    finally:
        path.write_text(sound, encoding="utf-8")
    broken = next((case for case in cases if case.end == "error" or NO_KILL.match(case.message)), None)
    failed = [case for case in cases if case.end == "failed" and case is not broken]
    if broken and not failed:
        raise RuntimeError(f"{broken.test} ended so: {broken.end}: {broken.message}")
    return sorted(failed, key=lambda case: case.seconds)


def near(mutant: Mutant) -> list[str]:
    """The tests of its part: the folder of that name, else those beside the folders."""
    folder = ROOT / "tests" / mutant.file.partition("/")[0]
    place = folder if folder.is_dir() else ROOT / "tests"
    return sorted(str(path.relative_to(ROOT)) for path in place.glob("test_*.py"))


def verdict(mutant: Mutant, work: Path, find: Sequence[str] | None) -> tuple[bool, str]:
    """Whether the named test catches the mistake, and what to say; with ``find`` which of these others does."""
    said = "**survived**"
    try:
        if mutant.test and plant(mutant, work, [mutant.test], "-x"):
            return True, f"`{mutant.test}`"
    except RuntimeError as error:
        said = f"**no verdict**: {one_line(error)}"
    if find is not None:
        try:
            caught = plant(mutant, work, find or near(mutant))
            said += "; caught by " + (", ".join(f"{c.test} ({c.seconds:.1f} s)" for c in caught[:8]) or "none")
        except RuntimeError as error:
            said += f"; {one_line(error)}"
    return False, said


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[-500:]


def try_all(mutants: Sequence[Mutant], places: Sequence[Path], find: Sequence[str] | None) -> int:
    """Print a row for each mutant; how many were caught."""
    free: queue.Queue[Path] = queue.Queue()
    for place in places:
        free.put(place)

    def one(mutant: Mutant) -> tuple[bool, str, float]:
        work, start = free.get(), time.monotonic()
        try:
            return *verdict(mutant, work, find), time.monotonic() - start
        finally:
            free.put(work)

    print("| file | mutant | caught by | s |\n|---|---|---|---|", flush=True)
    count = 0
    with ThreadPoolExecutor(len(places)) as threads:
        for mutant, (caught, said, seconds) in zip(mutants, threads.map(one, mutants), strict=True):
            count += caught
            print(f"| {mutant.file} | {mutant.name} | {said} | {seconds:.0f} |", flush=True)
    return count


def choose(mutants: list[Mutant], arguments: argparse.Namespace) -> list[Mutant]:
    """Those that the options ask for, in the order of the table."""
    chosen = [m for m in mutants if any(word in m.file or word in m.name for word in arguments.only)]
    if arguments.changed is None and not arguments.daily:
        return chosen
    some: list[Mutant] = []
    if arguments.changed is not None:
        revision = arguments.changed or default_revision()
        some = changed(chosen, revision)
        print(f"changed since {revision[:12]}: {len(some)} of {len(chosen)}", flush=True)
    today = datetime.datetime.now(datetime.UTC).toordinal()
    some += of_the_day(chosen, arguments.daily, today, some)
    if arguments.most is not None and len(some) > arguments.most:
        print(f"{arguments.most} of these {len(some)}, chosen by the date", flush=True)
        some = of_the_day(some, arguments.most, today)
    return [mutant for mutant in chosen if mutant in some]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="a word in the file or the name")
    parser.add_argument("--changed", nargs="?", const="", metavar="REV", help="those that changed since a commit")
    parser.add_argument("--daily", type=int, default=0, metavar="N", help="so many more, others every day")
    parser.add_argument("--most", type=int, metavar="N", help="of those that changed and of the day only so many")
    parser.add_argument("--find", nargs="*", metavar="TEST", help="try these, or the tests of its part, too")
    parser.add_argument("--check", action="store_true", help="only see that each can be planted and names a test")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8), help="mutants at a time")
    try:
        return run(parser.parse_args())
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1


def run(arguments: argparse.Namespace) -> int:
    """Do what is asked; the process's exit code."""
    mutants = read_table()
    wrong = problems(mutants)
    if wrong and arguments.find is None:
        raise RuntimeError("\n".join(wrong))
    mutants = choose(mutants, arguments)
    if arguments.check or not mutants:
        print(f"{len(mutants)} mutants can be planted")
        return 0
    with tempfile.TemporaryDirectory() as directory:
        jobs = max(1, min(arguments.jobs, len(mutants)))
        places = [make_copy(Path(directory) / str(n)) for n in range(jobs)]
        start = time.monotonic()
        if arguments.find is None:
            check_sound(places[0], sorted({mutant.test for mutant in mutants}), jobs)
            print(f"their tests pass without a mistake, in {time.monotonic() - start:.0f} s", flush=True)
        caught = try_all(mutants, places, arguments.find)
    print(f"\n{caught} of {len(mutants)} caught, in {time.monotonic() - start:.0f} s.")
    return 0 if caught == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
