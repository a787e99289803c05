"""Where the time of a rollout goes, by the operations of its decode steps, on the CPU.

    python scripts/profile_rollout.py [short]

Traces one rollout of a work of bench_rollout.py and adds up what XLA says each operation took, by the line of the model
that it comes from. Exact where one shape decodes, as on fixed lengths; several shapes number their operations alike but
not always the same.
"""

import collections
import gzip
import json
import os
import re
import sys
import tempfile
from pathlib import Path

CALLS = {"ThunkExecutor::Execute", "while", "ThunkExecutor::Execute (wait for completion)"}
"""Events that hold others."""


def sources(texts: list[str]) -> dict[str, str]:
    """Operations of compiled programs -> what of the model they are."""
    found: dict[str, str] = {}
    for text in texts:
        for name, source in re.findall(r'%?([\w.-]+) = .*?op_name="([^"]*)"', text):
            found.setdefault(name, re.sub(r"^jit\(\w+\)/(while/body/)?", "", source))
    return found


def totals(events: list[dict], source: dict[str, str]) -> list[tuple[str, float, int]]:
    """(what, milliseconds, count) of the events of decode segments, longest first."""
    taken: dict[str, list[float]] = collections.defaultdict(list)
    for event in events:
        about = event.get("args", {})
        if event.get("ph") == "X" and "segment" in about.get("hlo_module", "") and event["name"] not in CALLS:
            operation = about.get("hlo_op", event["name"])
            taken[source.get(operation, re.sub(r"[.\d]+$", "", operation))].append(event["dur"] / 1e3)
    return sorted(((what, sum(each), len(each)) for what, each in taken.items()), key=lambda row: -row[1])


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "short"
    with tempfile.TemporaryDirectory() as directory:
        os.environ["XLA_FLAGS"] = f"--xla_dump_to={directory}/hlo --xla_dump_hlo_module_re=.*segment.*"
        import jax
        from bench_rollout import WORKS, Ours

        ours = Ours(WORKS[name])
        ours.engine_seconds()
        plain = ours.engine_seconds()
        with jax.profiler.trace(f"{directory}/trace"):
            ours.engine_seconds()
        trace = next(Path(directory, "trace").rglob("*.trace.json.gz"))
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        texts = [path.read_text() for path in Path(directory, "hlo").glob("*after_optimizations.txt")]
    rows = totals(events, sources(texts))
    print(f"{WORKS[name]}: {plain:.3f} s, {ours.counts.steps} steps\n\n| operation | ms | calls |\n|---|---|---|")
    for what, milliseconds, count in rows[:20]:
        print(f"| {what} | {milliseconds:.0f} | {count} |")
    print(f"| the others | {sum(row[1] for row in rows[20:]):.0f} | {sum(row[2] for row in rows[20:])} |")


if __name__ == "__main__":
    main()
