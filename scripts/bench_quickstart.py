"""Measure the quickstart as a user runs it: five seeds and two controls, each a process of its own with a cold cache.

python scripts/bench_quickstart.py [--output runs/quickstart-bench] [--picture docs/quickstart.png]

Prints a table for docs/BENCHMARKS.md and draws the README's picture. Run it on an otherwise idle machine.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

ROOT = Path(__file__).parent.parent
SHUFFLED = "--reward.functions quickstart grpo_jax.quickstart.controls:shuffled --reward.weights 0.0 1.0".split()
ARMS = {"GRPO": [], "control: rewards shuffled": SHUFFLED, "control: learning rate 0": ["--optim.learning_rate", "0.0"]}
TARGET = 0.85


def run(arguments: list[str], directory: Path, cache: Path) -> dict[str, object]:
    """One run; a run that is there already is read."""
    wall = directory / "wall.json"
    if not wall.exists():
        command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--output_dir", str(directory)]
        command += ["--compilation_cache", str(cache), *arguments]
        begun = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wall.write_text(json.dumps(time.perf_counter() - begun))
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((directory / "summary.json").read_text())
    curve = [(row["step"], row["eval/accuracy"], row["seconds/elapsed"]) for row in rows if "eval/accuracy" in row]
    first = next(row for row in rows if "eval/pass_at_k" in row)
    gaps = [row for row in rows if "sampler_logp_difference/mean" in row]
    return {
        "wall": json.loads(wall.read_text()),
        "summary": summary,
        "curve": curve,
        "pass_at_k": first["eval/pass_at_k"],
        "gap_mean": max(row["sampler_logp_difference/mean"] for row in gaps),
        "gap_max": max(row["sampler_logp_difference/max"] for row in gaps),
        "steps": {row["step"]: row for row in gaps},
    }


def line(name: str, seed: int, result: dict) -> str:
    summary, curve = result["summary"], result["curve"]
    start = result["wall"] - summary["seconds"]
    reached = next((f"{start + seconds:.0f}" for _, accuracy, seconds in curve if accuracy >= TARGET), "-")
    phases = summary["seconds_by_phase"]
    shown = ", ".join(f"{p} {phases[p]:.0f}" for p in ("rollout", "update", "evaluate", "reward") if p in phases)
    return (
        f"| {name} | {seed} | {summary['accuracy_first']:.1%} | {summary['accuracy_last']:.1%} | {reached} | "
        f"{result['wall']:.0f} | {summary['compile_seconds']:.1f} | {shown} | "
        f"{summary['peak_memory_bytes'] / 2**20:.0f} | {result['gap_mean']:.1e}, {result['gap_max']:.1e} |"
    )


def draw(results: dict[str, dict[int, dict]], path: Path) -> None:
    figure, axis = pyplot.subplots(figsize=(7.5, 4), constrained_layout=True)
    for color, (name, seeds) in zip(("tab:blue", "tab:orange", "tab:gray"), results.items(), strict=True):
        for i, result in enumerate(seeds.values()):
            steps, accuracy, _ = zip(*result["curve"], strict=True)
            style = {"color": color, "alpha": 0.8, "linewidth": 1.5}
            axis.plot(
                steps,
                [100 * a for a in accuracy],
                label=f"{name} ({len(seeds)} seed{'s' * (len(seeds) > 1)})" if i == 0 else None,
                **style,
            )
    axis.axhline(100 * TARGET, color="black", linewidth=0.8, linestyle=":")
    axis.set(xlabel="step (256 completions each)", ylabel="held-out greedy accuracy (%)", ylim=(0, 100))
    axis.grid(alpha=0.3)
    axis.legend(loc="center right")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart-bench"))
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "quickstart.png")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    print(
        "| run | seed | accuracy at step 0 | at the end | s to 85 % | s in all | compile s "
        "| s by phase | MiB | log-prob gap |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    results: dict[str, dict[int, dict]] = {}
    for name, arguments in ARMS.items():
        # Controls need fewer seeds: at learning rate 0 they are all the same.
        for seed in range({"GRPO": options.seeds, "control: learning rate 0": 1}.get(name, min(3, options.seeds))):
            place = f"{name.split()[-1]}-{seed}"
            extra = [*arguments, "--seed", str(seed)]
            result = run(extra, options.output / place, options.output / f"cache-{place}")
            results.setdefault(name, {})[seed] = result
            print(line(name, seed, result), flush=True)
    warm = run([], options.output / "warm", options.output / "cache-GRPO-0")
    print(line("GRPO, compiled programs cached", 0, warm))
    print(f"pass@8 at step 0: {warm['pass_at_k']:.1%}")
    draw(results, options.picture)


if __name__ == "__main__":
    main()
