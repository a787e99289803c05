"""Figures of the models: differences from transformers, loading, and the forward pass.

    python scripts/bench_models.py parity    # largest difference of each family, tests' cases, from the golden file
    python scripts/bench_models.py load      # time and peak memory for 1.1 billion parameters in bfloat16
    python scripts/bench_models.py forward   # tokens per second of 4 layers of width 512, rows [8, 512]
    python scripts/bench_models.py adapters  # LoRA for sampling: merged into the weights, or applied on the fly

``load`` and ``forward`` compare with transformers and torch in the same run, each in processes of their own, in turns,
and need both; ``load`` writes 2.2 GB to a temporary directory (--dir chooses it).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parent.parent / "tests" / "models"
BILLION = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SMALL = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
ROUNDS = 4


def parity() -> None:
    """Prints, for each family, its cases and the largest difference relative to the largest logit."""
    sys.path.insert(0, str(TESTS))
    from hf_cases import CASES, LONGEST, draw, draw_tokens
    from model_cases import relative, write_checkpoint

    from grpo_jax.models import load_model

    largest: dict[str, list[float]] = {}
    with np.load(TESTS / "golden.npz") as golden, tempfile.TemporaryDirectory() as directory:
        for case in CASES:
            shapes = json.loads(str(golden[f"{case}/shapes"]))
            config = json.loads(str(golden[f"{case}/config"]))
            tensors = {name: draw(name, tuple(shape)) for name, shape in shapes.items()}
            place = write_checkpoint(Path(directory, config["model_type"]), config, tensors)
            model, params = load_model(place, longest=LONGEST.get(case, 0))
            difference = relative(model.logits(params, draw_tokens())[0], golden[f"{case}/logits"])
            largest.setdefault(config["model_type"], []).append(difference)
    for family, differences in largest.items():
        print(f"{family:12} {len(differences)} cases, largest difference {max(differences):.1e}")


class Memory:
    """The largest anonymous and the largest whole resident memory of this process while it is measured, in bytes."""

    def __init__(self) -> None:
        self.before = self._now()
        self.peak, self._done = list(self.before), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    @staticmethod
    def _now() -> list[int]:
        lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        return [int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS")]

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.peak = [max(pair) for pair in zip(self.peak, self._now(), strict=True)]

    def stop(self) -> list[int]:
        self._done.set()
        self._thread.join()
        return [peak - before for peak, before in zip(self.peak, self.before, strict=True)]


def write_random(directory: Path) -> int:
    """Writes a checkpoint of ``BILLION`` with random bits as mantissas; returns its bytes of parameters."""
    import ml_dtypes
    from safetensors.numpy import save_file

    from grpo_jax.models import Model, ModelSpec
    from grpo_jax.models.tensors import list_tensors

    rng, held, listed, total = np.random.default_rng(0), {}, {}, 0
    (directory / "config.json").write_text(json.dumps(BILLION | {"architectures": ["LlamaForCausalLM"]}))
    tensors = list_tensors(Model(ModelSpec.from_hf(BILLION)))
    for index, tensor in enumerate(tensors):
        bits = rng.integers(0, 2**16, tensor.shape, np.uint16)
        held[tensor.name] = ((bits & 0x807F) | 0x3C00).view(ml_dtypes.bfloat16)
        total += held[tensor.name].nbytes
        if index + 1 == len(tensors) or sum(value.nbytes for value in held.values()) > 5e8:
            file = f"model-{len(set(listed.values())):05d}.safetensors"
            save_file(held, directory / file, metadata={"format": "pt"})
            listed |= dict.fromkeys(held, file)
            held = {}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return total


def load_ours(directory: str) -> dict[str, float]:
    import jax

    from grpo_jax.models import load_model

    jax.block_until_ready(jax.numpy.zeros(8))
    memory, start = Memory(), time.perf_counter()
    _, params = load_model(directory, dtype="bfloat16", param_dtype="bfloat16")
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    anonymous, resident = memory.stop()
    return {"seconds": seconds, "anonymous": anonymous, "resident": resident}


def load_theirs(directory: str) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  (its import is not measured)

    memory, start = Memory(), time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    mapped = time.perf_counter() - start  # the tensors are the mapped files' pages, read on first touch
    for value in model.parameters():
        value.data = value.data.clone()
    seconds = time.perf_counter() - start
    anonymous, resident = memory.stop()
    return {"seconds": seconds, "mapped_seconds": mapped, "anonymous": anonymous, "resident": resident}


def forward_ours(directory: str) -> dict[str, float]:
    import jax

    from grpo_jax.models import load_model

    model, params = load_model(directory)
    return _tokens_per_second(lambda tokens: jax.block_until_ready(model.logits(params, tokens)))


def forward_theirs(directory: str) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def forward(tokens: np.ndarray) -> None:
        with torch.inference_mode():
            model(torch.from_numpy(tokens).long(), use_cache=False)

    return _tokens_per_second(forward)


def _tokens_per_second(forward) -> dict[str, float]:
    tokens = np.random.default_rng(0).integers(0, SMALL["vocab_size"], (8, 512)).astype(np.int32)
    forward(tokens)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        forward(tokens)
        times.append(time.perf_counter() - start)
    return {"tokens_per_second": tokens.size / min(times)}


SUBJECTS = {f.__name__: f for f in (load_ours, load_theirs, forward_ours, forward_theirs)}


def measure(what: str, directory: Path) -> dict[str, list[dict[str, float]]]:
    """Ours and theirs in turns, each in new processes, and in every other round the other way round."""
    found: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    for round_ in range(ROUNDS):
        for who in sorted(found, reverse=bool(round_ % 2)):
            for file in directory.iterdir():  # into the page cache: what is measured is not the disk
                with open(file, "rb", buffering=0) as handle:
                    while handle.read(2**24):
                        pass
            command = [sys.executable, __file__, "one", f"{what}_{who}", "--dir", str(directory)]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found[who].append(json.loads(output.splitlines()[-1]))
    return found


def load(directory: Path) -> None:
    size = write_random(directory)
    found = measure("load", directory)
    for who, results in found.items():
        times = sorted(result["seconds"] for result in results)
        anonymous, resident = (max(result[name] for result in results) / size for name in ("anonymous", "resident"))
        print(f"{who:7} {', '.join(f'{seconds:.2f}' for seconds in times)} s; ", end="")
        print(f"peak host memory {anonymous:.2f} (with mapped files {resident:.2f}) x parameters")
    ours, theirs = (min(result["seconds"] for result in found[who]) for who in ("ours", "theirs"))
    mapped = min(result["mapped_seconds"] for result in found["theirs"])
    print(f"best: {ours / theirs:.2f} x transformers' into memory of their own, for {size / 1e9:.2f} GB")
    print(f"(transformers returns after {mapped:.2f} s with the files mapped; a first update would copy every page)")


def forward(directory: Path) -> None:
    from grpo_jax.models import Model, ModelSpec, save_hf

    model = Model(ModelSpec.from_hf(SMALL | {"model_type": "qwen2"}))
    save_hf(model, model.init(0), directory)
    found = measure("forward", directory)
    best = {who: max(result["tokens_per_second"] for result in results) for who, results in found.items()}
    print(f"ours {best['ours']:,.0f}, theirs {best['theirs']:,.0f} tokens/s: {best['ours'] / best['theirs']:.2f}")


def adapters() -> None:
    """One token of 64 rows through every layer, as in decoding: adapters on the fly, adapters merged, and merging."""
    import jax
    import jax.numpy as jnp

    from grpo_jax.models import LoraSpec, Model, ModelSpec

    model = Model(ModelSpec.from_hf(SMALL | {"model_type": "qwen2"}), lora=LoraSpec(16, 32.0))
    params = model.joined(model.init_adapters(1), model.base.init(0))
    one = jnp.ones((64, 1), jnp.int32)
    forward = jax.jit(lambda kind, values: kind.hidden(values, one, one - 1, one), static_argnums=0)
    merged = jax.block_until_ready(model.merged(params))
    work = {
        "on the fly": lambda: forward(model, params),
        "merged": lambda: forward(model.base, merged),
        "merging": lambda: model.merged(params),
    }
    best = dict.fromkeys(work, float("inf"))
    for round_ in range(21):
        for name, run in work.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if round_:
                best[name] = min(best[name], time.perf_counter() - start)
    print(", ".join(f"{name} {1000 * seconds:.2f} ms" for name, seconds in best.items()))
    gain = best["on the fly"] - best["merged"]
    print(f"on the fly / merged: {best['on the fly'] / best['merged']:.2f}; ", end="")
    print(f"merging pays after {best['merging'] / gain:.0f} tokens a row" if gain > 0 else "merging never pays")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("parity", "load", "forward", "adapters", "one"))
    parser.add_argument("subject", nargs="?", choices=SUBJECTS)
    parser.add_argument("--dir", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "parity":
        parity()
    elif arguments.what == "adapters":
        adapters()
    elif arguments.what == "one":
        print(json.dumps(SUBJECTS[arguments.subject](str(arguments.dir))))
    else:
        with tempfile.TemporaryDirectory(dir=arguments.dir) as directory:
            {"load": load, "forward": forward}[arguments.what](Path(directory))


if __name__ == "__main__":
    main()
