"""Where the time of the last test run went, by kind, by file and by test.

    pytest && python scripts/show_durations.py
    python scripts/show_durations.py --most 40 --only tests/rollout

A run of pytest leaves what it measured in .pytest_cache (tests/durations.py). Kinds: `compile` is XLA's compiler or
reading a program that is kept, `trace` what JAX does before it, `process` the wait for started processes, `sleep` real
sleeps, `rest` everything else of the wall time; `Hypothesis` is the wall time of tests whose inputs Hypothesis chose,
whatever they did in it. `cpu` is the processor time of the process that tests, without those that it starts.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from grpo_jax.cli import in_a_line

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / ".pytest_cache" / "d" / "durations" / "tests.jsonl"
KINDS = ("compile", "trace", "process", "sleep")
LONG_FILE = 60
"""Seconds of wall time that one test file should not exceed."""


def read_rows(path: Path, only: str) -> list[dict]:
    """Return what was measured of each test whose name holds `only`."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file, since no test ran here yet. Run pytest first.")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if only in row["test"]]


def total(rows: Iterable[dict]) -> Counter[str]:
    """Return the sums of a list of tests, and what of their wall time is of no kind."""
    sums: Counter[str] = Counter()
    for row in rows:
        sums.update({name: value for name, value in row.items() if isinstance(value, int | float)})
        sums["tests"] += 1
        sums["Hypothesis"] += row["wall"] if row.get("hypothesis") else 0
    sums["rest"] = max(0.0, sums["wall"] - sum(sums[kind] for kind in KINDS))
    return sums


def table(title: str, named: dict[str, Counter[str]], most: int) -> str:
    """Return the rows of largest wall time as a Markdown table."""
    names = ("tests", "wall", "cpu", *KINDS, "rest", "programs", "processes")
    lines = [f"| {title} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    ordered = sorted(named.items(), key=lambda pair: -pair[1]["wall"])
    for name, sums in ordered[:most]:
        lines.append(f"| {name} | " + " | ".join(f"{sums[key]:.0f}" for key in names) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=20, help="rows of the tables of files and tests")
    parser.add_argument("--only", default="", metavar="WORD", help="tests whose name holds it")
    parser.add_argument("--file", type=Path, default=MEASURED, help="what a run left")
    arguments = parser.parse_args()
    rows = read_rows(arguments.file, arguments.only)
    files, functions = defaultdict(list), defaultdict(list)
    for row in rows:
        files[row["test"].split("::")[0]].append(row)
        functions[row["test"].split("[")[0]].append(row)
    sums = total(rows)
    print("| kind | seconds | share of wall |\n|---|---|---|")
    for kind in ("wall", "cpu", *KINDS, "rest", "Hypothesis"):
        print(f"| {kind} | {sums[kind]:.0f} | {sums[kind] / (sums['wall'] or 1):.0%} |")
    print(f"\n{sums['tests']} tests, {sums['programs']} programs, {sums['processes']} started processes.\n")
    print(table("file", {name: total(each) for name, each in files.items()}, arguments.most), end="\n\n")
    print(table("test", {name: total(each) for name, each in functions.items()}, arguments.most))
    long = [name for name, each in files.items() if total(each)["wall"] > LONG_FILE]
    if long:
        print(f"\nOver {LONG_FILE} s: {', '.join(sorted(long))}")


if __name__ == "__main__":
    sys.exit(in_a_line(main))
