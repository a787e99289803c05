"""Plant one mistake at a time in a copy of grpo_jax/algo, run tests/algo against it and print which were caught.

    python scripts/mutate.py                  # all of them, about a minute each
    python scripts/mutate.py --only losses    # those whose file or name holds the word

A mutant that no test of its own part catches is tried against all of tests/algo before it counts as survived.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
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
FIRST_OF_LOSS = ("test_properties_loss.py", "test_edges_loss.py", "test_reference_loss.py", "test_trl.py")


def pytest(work: Path, tests: list[Path]) -> str | None:
    """Run tests against the package under `work`; return the first that failed, None if all passed."""
    environment = os.environ | {"PYTHONPATH": str(work), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", "--tb=no", "-rfE"]
    command += ["--durations=0", "--durations-min=1000", *map(str, tests)]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if not failed:
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return failed[0].removeprefix("tests/algo/")


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


def try_mutant(mutant: Mutant, work: Path) -> str | None:
    """Plant the mistake, run the tests, take it out again; return the test that caught it."""
    path = work / "grpo_jax/algo" / mutant.file
    sound = path.read_text()
    path.write_text(sound.replace(mutant.old, mutant.new))
    try:
        every = sorted((work / "tests/algo").glob("test_*.py"))
        near = [work / "tests/algo" / name for name in FIRST.get(mutant.file, FIRST_OF_LOSS)]
        for tests in (near, [test for test in every if test not in near]):
            caught = pytest(work, tests) if tests else None
            if caught:
                return caught
        return None
    finally:
        path.write_text(sound)


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
    parser.add_argument("--only", default="", help="a word in the file or the name")
    parser.add_argument("--check", action="store_true", help="only see that each mutant can still be planted")
    arguments = parser.parse_args()
    mutants = [m for m in read_table() if arguments.only in m.file or arguments.only in m.name]
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
            caught = try_mutant(mutant, work)
            survived += caught is None
            shown = f"`{caught}`" if caught else "**survived**"
            print(f"| {mutant.file} | {mutant.name} | {shown} | {time.monotonic() - start:.0f} |", flush=True)
    print(f"\n{len(mutants) - survived} of {len(mutants)} caught.")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
