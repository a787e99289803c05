"""The ladder from "only the reward" to DAPO: every rung from one start, on the quickstart's task, then compared.

python scripts/ladder.py [--output runs/ladder] [--seeds 3] [--steps 40]

Each run is a process of its own; one that is there already is read, so the script goes on where it was stopped.
Draws docs/ladder.png and writes the tables between the markers of docs/LADDER.md.
"""

import argparse
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import orbax.checkpoint as ocp

from grpo_jax.testing import tiny_checkpoint

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

ROOT = Path(__file__).parent.parent
MARKERS = {name: (f"<!-- {name}: scripts/ladder.py -->", f"<!-- end of {name} -->") for name in ("table", "cost")}
REUSE = "--optim.epochs 2"
"""A ratio makes a second pass over a rollout legal; the rungs without one cannot take it."""
NO_KL = "--algorithm.loss.kl_coef 0"
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}
"""Two-sided 95 % point of Student's t for n - 1 degrees of freedom, by n."""
WARM, MEASURED, DECAY = 16, 32, 0.999
"""Steps in which a critic may learn, steps whose gradients are compared, and the first moment's decay meanwhile."""


@dataclass(frozen=True)
class Rung:
    """One rung: its name, its options over the quickstart's, and those that measure its gradient's noise."""

    name: str
    options: str

    @property
    def place(self) -> str:
        return "".join(c if c.isalnum() else "_" for c in self.name.lower())


RUNGS = (
    Rung("raw reward", f"--algorithm.preset reinforce {NO_KL}"),
    Rung("batch baseline", f"--algorithm.preset reinforce_baseline {NO_KL}"),
    Rung("critic", f"--algorithm.preset ppo --algorithm.loss.surrogate reinforce {NO_KL}"),
    Rung("critic + clip (PPO)", f"--algorithm.preset ppo {NO_KL} {REUSE}"),
    Rung("PPO + reference KL", f"--algorithm.preset ppo --algorithm.loss.kl_coef 0.04 {REUSE}"),
    Rung("GRPO", f"--algorithm.preset grpo --algorithm.loss.kl_coef 0.04 {REUSE}"),
    Rung("Dr. GRPO", f"--algorithm.preset dr_grpo {NO_KL} {REUSE}"),
    Rung("DAPO", f"--algorithm.preset dapo --algorithm.overlong_buffer_len 2 {NO_KL} {REUSE}"),
)
NOISE_RUNGS = ("raw reward", "batch baseline", "critic", "GRPO", "Dr. GRPO")
"""Rungs whose gradient differs at the start, where the policy is the old one: clip, min and KL have no effect yet."""


COSTS = (
    ("GRPO", f"--algorithm.preset grpo {NO_KL}"),
    ("GRPO + reference KL", "--algorithm.preset grpo --algorithm.loss.kl_coef 0.04"),
    ("PPO, critic of its own", f"--algorithm.preset ppo {NO_KL}"),
    ("PPO, critic on the policy's trunk", f"--algorithm.preset ppo --critic.shared_trunk true {NO_KL}"),
)
WIDE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
"""A model large enough for its state to be most of the memory; random weights, for cost does not depend on them."""


def train(options: str, directory: Path, output: Path) -> Path:
    """One run as a process; a finished one is left as it is."""
    if not (directory / "summary.json").exists():
        command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--output_dir", str(directory), "--log.quiet"]
        command += ["true", "--compilation_cache", str(output / "cache"), *options.split()]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return directory


def read(directory: Path) -> dict:
    """Accuracy against completions sampled, seconds per step and memory of a run."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((directory / "summary.json").read_text())
    sampled, steps = {0: 0.0}, [row for row in rows if "reward" in row]
    for row in steps:
        sampled[row["step"]] = sampled[row["step"] - 1] + 8 * row.get("dynamic_sampling/groups_sampled", 32)
    return {
        "curve": [(sampled[row["step"]], row["eval/accuracy"]) for row in rows if "eval/accuracy" in row],
        "last": summary["accuracy_last"],
        "seconds": float(np.median([row["seconds"] for row in steps[2:]])),
        "memory": summary["peak_memory_bytes"],
    }


def noise(rung: Rung, output: Path) -> float:
    """Trace of the gradient's covariance over its squared length, for batches of 256 completions at the start.

    At learning rate 0 the policy stays what it was, so every step gives one more independent gradient g_i. Their
    norms are logged, and their sum stands in Adam's first moment: m_k = (1 - b) sum_i b^(k-i) g_i.
    """
    steps = WARM + MEASURED
    options = f"{rung.options.replace(REUSE, '')} --steps {steps} --optim.learning_rate 0 --optim.schedule constant"
    options += f" --optim.beta1 {DECAY} --optim.max_grad_norm none --eval.every none --eval.prompts 8 --eval.samples 0"
    options += f" --checkpoint.every {WARM} --checkpoint.keep 9"
    directory = train(options, output / f"noise-{rung.place}", output)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    norms = {row["step"]: row["grad_norm"] for row in rows if "grad_norm" in row}
    weights = (1 - DECAY) * DECAY ** np.arange(MEASURED)[::-1]
    total = moment(directory, steps) - DECAY**MEASURED * moment(directory, WARM)
    mean = total / weights.sum()
    share = weights / weights.sum()
    square = sum(w * norms[WARM + 1 + i] ** 2 for i, w in enumerate(share))  # E|g|^2 = |E g|^2 + tr Cov
    spread = (square - float(mean @ mean)) / (1 - float(share @ share))
    return spread / max(square - spread, 0.0) if square > spread else math.inf


def moment(directory: Path, step: int) -> np.ndarray:
    """Adam's first moment of the policy at a checkpoint, as one vector."""
    place = (directory / "checkpoints" / str(step) / "state").resolve()
    with ocp.StandardCheckpointer() as checkpointer:
        leaves = checkpointer.restore(place)
    policy = [leaves[name] for name in sorted(leaves) if ".mu" in name and "critic" not in name]
    assert policy, f"no first moment among {sorted(leaves)[:5]}"
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in policy])


def cost(output: Path) -> str:
    """Markdown: what a critic and a reference add to time and memory, on a model of 46 million parameters."""
    model = output / "wide"
    if not model.exists():
        tiny_checkpoint(model, scale=1.0, vocab_size=8192, max_position_embeddings=512, **WIDE)
    shape = f"--model.path {model} --reward.functions repetition_penalty --steps 6 --eval.every none --eval.prompts 8 "
    shape += "--eval.samples 0 --rollout.prompts_per_step 8 --rollout.num_samples 8 --rollout.max_new_tokens 64 "
    shape += "--optim.microbatch_rows 16 --checkpoint.every none"
    lines = ["| | s a step | times GRPO | peak MiB | times GRPO |", "|---|---|---|---|---|"]
    first: dict | None = None
    for name, options in COSTS:
        place = "".join(c if c.isalnum() else "_" for c in name.lower())
        found = read(train(f"{shape} {options}", output / f"cost-{place}", output))
        first = first or found
        lines.append(
            f"| {name} | {found['seconds']:.2f} | {found['seconds'] / first['seconds']:.2f} "
            f"| {found['memory'] / 2**20:.0f} | {found['memory'] / first['memory']:.2f} |"
        )
    return "\n".join(lines)


def write(page: Path, name: str, text: str) -> None:
    """Put a text between two markers of a page."""
    begin, end = MARKERS[name]
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def pace(rung: Rung, output: Path) -> dict:
    """Seconds per step and peak memory, of short runs one right after the other: run these on an idle machine."""
    options = f"{rung.options} --steps 10 --eval.every none --eval.prompts 8 --eval.samples 0 --checkpoint.every none"
    return read(train(options, output / f"pace-{rung.place}", output))


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval over seeds."""
    half = T_95.get(len(values), 2.0) * np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.mean(values)), float(half)


def table(results: dict[str, list[dict]], noises: dict[str, float], paces: dict[str, dict]) -> str:
    """Markdown: a row a rung."""
    lines = [
        "| rung | held-out accuracy at the end | against the rung before | completions sampled | gradient noise "
        "| s a step | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    before: list[dict] | None = None
    for name, runs in results.items():
        mean, half = interval([run["last"] for run in runs])
        against = "-"
        if before is not None:
            gain, width = interval([a["last"] - b["last"] for a, b in zip(runs, before, strict=True)])
            verdict = "better" if gain > width else "worse" if gain < -width else "no difference shown"
            against = f"{100 * gain:+.1f} ± {100 * width:.1f}: {verdict}"
        noisy = f"{noises[name]:.2g}" if name in noises else "as above"
        lines.append(
            f"| {name} | {100 * mean:.1f} ± {100 * half:.1f} % | {against} "
            f"| {np.mean([run['curve'][-1][0] for run in runs]):.0f} | {noisy} "
            f"| {paces[name]['seconds']:.2f} | {paces[name]['memory'] / 2**20:.0f} |"
        )
        before = runs
    return "\n".join(lines)


def draw(results: dict[str, list[dict]], noises: dict[str, float], paces: dict[str, dict], path: Path) -> None:
    """Accuracy with a band over seeds; noise, memory and seconds as bars."""
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 9), constrained_layout=True)
    colors = dict(zip(results, pyplot.get_cmap("tab10").colors, strict=False))
    for name, runs in results.items():
        least = min(run["curve"][-1][0] for run in runs)
        grid = np.linspace(0, least, 50)
        curves = 100 * np.array([np.interp(grid, *zip(*run["curve"], strict=True)) for run in runs])
        axes[0, 0].plot(grid, curves.mean(0), color=colors[name], label=name)
        axes[0, 0].fill_between(grid, curves.min(0), curves.max(0), color=colors[name], alpha=0.15, linewidth=0)
    axes[0, 0].set(xlabel="completions sampled", ylabel="held-out greedy accuracy (%)")
    axes[0, 0].set_title("accuracy: mean over seeds, band from least to most")
    axes[0, 0].legend(fontsize=8)
    bars = (
        (axes[0, 1], "gradient noise (trace of covariance / squared length)", noises),
        (axes[1, 0], "peak memory (MiB)", {name: found["memory"] / 2**20 for name, found in paces.items()}),
        (axes[1, 1], "seconds per step", {name: found["seconds"] for name, found in paces.items()}),
    )
    for axis, title, values in bars:
        names = list(values)
        axis.barh(names, [values[name] for name in names], color=[colors[name] for name in names])
        axis.invert_yaxis()
        axis.set_title(title)
        axis.bar_label(axis.containers[0], fmt=lambda x: f"{x:.0f}" if x >= 100 else f"{x:.2f}", padding=3)
        axis.margins(x=0.15)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/ladder"))
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "LADDER.md")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "ladder.png")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict]] = {}
    for seed in range(asked.seeds):
        for rung in RUNGS:
            options = f"{rung.options} --steps {asked.steps} --eval.every 5 --eval.samples 0 --seed {seed}"
            directory = train(options, asked.output / f"{rung.place}-{seed}", asked.output)
            results.setdefault(rung.name, []).append(read(directory))
            print(f"{rung.name}, seed {seed}: {results[rung.name][-1]['last']:.1%}", flush=True)
    noises = {rung.name: noise(rung, asked.output) for rung in RUNGS if rung.name in NOISE_RUNGS}
    paces = {rung.name: pace(rung, asked.output) for rung in RUNGS}
    rows = table(results, noises, paces)
    print(rows)
    draw(results, noises, paces, asked.picture)
    write(asked.page, "table", rows)
    costs = cost(asked.output)
    print(costs)
    write(asked.page, "cost", costs)


if __name__ == "__main__":
    main()
