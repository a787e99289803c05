"""Plant one mistake at a time in a copy of grpo_jax/algo, run tests/algo against it and print which were caught.

    python scripts/mutate.py                            # all of them, about a minute each
    python scripts/mutate.py --only losses "geo_gate"   # those whose file or name holds one of the words
    python scripts/mutate.py --near                     # by the tests of its own part alone
    python scripts/mutate.py --tests test_trl.py        # by these tests of tests/algo alone

Caught means: a test ran and failed, and passes again once the mistake is out. Tests that can't be collected, or that
fail on the sound code too, end the run. What no test of its own part catches is tried against all of tests/algo.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "scripts" / "mutants.toml"


class Mutant(NamedTuple):
    """A mistake: in `file` of grpo_jax/algo, `old`, which occurs once, becomes `new`."""

    name: str
    file: str
    old: str
    new: str


FIRST = {
    "advantages.py": ("test_properties.py", "test_edges.py", "test_reference.py"),
    "kl.py": ("test_properties.py", "test_edges_loss.py"),
    "best_of_k.py": ("test_properties.py", "test_edges.py", "test_reference.py"),
    "critic.py": ("test_reference.py", "test_edges_loss.py"),
    "controllers.py": ("test_reference.py",),
    "shaping.py": ("test_reference.py", "test_edges_loss.py"),
    "logprobs.py": ("test_logprobs.py",),
    "spec.py": ("test_refusals.py",),
    "refusals.py": ("test_refusals.py",),
}
"""The tests to try first, by file; for the others those of the loss."""
FIRST_OF_LOSS = tuple(
    f"test_{name}.py" for name in ("properties_loss", "edges_loss", "reference_loss", "contract5", "trl")
)


def pytest(work: Path, tests: list[str]) -> str | None:
    """Run tests against the package under `work`; return the first that failed, None if all passed."""
    environment = os.environ | {"PYTHONPATH": str(work), "PYTHONDONTWRITEBYTECODE": "1"}
    # Every program is kept, since a mutant changes few of them.
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(work / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", "--tb=no", "-rf"]
    command += ["--durations=0", "--durations-min=1000", "-n", "0", *tests]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    failed = [line.removeprefix("FAILED ") for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    if done.returncode != 1 or not failed:
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return failed[0].split(" - ")[0]


def prepare(work: Path) -> None:
    """Copy the package and its tests, and see that the copy is what gets imported."""
    for part in ("grpo_jax", "tests", "scripts", "docs"):
        shutil.copytree(ROOT / part, work / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", work)
    found = subprocess.run(
        [sys.executable, "-c", "import grpo_jax; print(grpo_jax.__file__)"],
        cwd=work, env=os.environ | {"PYTHONPATH": str(work)}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    if not found.startswith(str(work)):
        raise RuntimeError(f"the copy is not what is imported: {found}")


def try_mutant(mutant: Mutant, work: Path, near_only: bool = False, named: Sequence[str] = ()) -> str | None:
    """Plant the mistake, run the tests, take it out again; return the test that caught it."""
    path = work / "grpo_jax/algo" / mutant.file
    sound = path.read_text()
    near = [f"tests/algo/{name}" for name in named or FIRST.get(mutant.file, FIRST_OF_LOSS)]
    every = sorted(f"tests/algo/{test.name}" for test in (work / "tests/algo").glob("test_*.py"))
    rest = [] if near_only or named else [test for test in every if test not in near]
    path.write_text(sound.replace(mutant.old, mutant.new))
    try:
        caught = pytest(work, near) or (pytest(work, rest) if rest else None)
    finally:
        path.write_text(sound)
    if caught and pytest(work, [caught]):
        raise RuntimeError(f"{mutant.name}: {caught} fails without the mistake too")
    return caught


def read_table() -> list[Mutant]:
    """Return the mutants; raise unless each old text occurs exactly once, so that the table can't fall behind."""
    mutants = [Mutant(**row) for row in tomllib.loads(TABLE.read_text())["mutant"]]
    for mutant in mutants:
        count = (ROOT / "grpo_jax/algo" / mutant.file).read_text().count(mutant.old)
        if count != 1 or mutant.old == mutant.new:
            raise ValueError(f"{mutant.name}: {mutant.file} holds its text {count} times, not once")
    return mutants


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="a word in the file or the name")
    parser.add_argument("--near", action="store_true", help="only the tests of the mutant's own part")
    parser.add_argument("--tests", nargs="+", default=[], metavar="TEST", help="files of tests/algo, or file::test")
    parser.add_argument("--check", action="store_true", help="only see that each mutant can still be planted")
    arguments = parser.parse_args()
    mutants = [m for m in read_table() if any(word in m.file or word in m.name for word in arguments.only)]
    if arguments.check:
        print(f"{len(mutants)} mutants can be planted")
        return 0
    survived = 0
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        prepare(work)
        print("| file | mutant | caught by | s |\n|---|---|---|---|")
        for mutant in mutants:
            start = time.monotonic()
            caught = try_mutant(mutant, work, arguments.near, arguments.tests)
            survived += caught is None
            shown = f"`{caught.removeprefix('tests/algo/')}`" if caught else "**survived**"
            print(f"| {mutant.file} | {mutant.name} | {shown} | {time.monotonic() - start:.0f} |", flush=True)
    print(f"\n{len(mutants) - survived} of {len(mutants)} caught.")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
