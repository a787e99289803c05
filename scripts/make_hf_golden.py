"""Writes tests/models/golden.npz: logits and gradients of transformers for the cases of tests/models/hf_cases.py.

    python scripts/make_hf_golden.py

Needs torch and transformers; nothing of grpo_jax is imported, so the file knows nothing of its mistakes. For each case:
config.json as text, names and shapes of its tensors (their values are drawn from their names), and the first row's
logits [LENGTH, V] float32. For the cases in GRADIENTS also the gradient of the mean log-probability of tokens[:, 1:]
for every tensor of one dimension.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

TESTS = Path(__file__).resolve().parent.parent / "tests" / "models"
sys.path.insert(0, str(TESTS))

from hf_cases import CASES, GRADIENTS, draw, draw_tokens, fields  # noqa: E402


def golden(case: str) -> dict[str, np.ndarray]:
    config = getattr(transformers, CASES[case][0])(**fields(case))
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "model.safetensors")
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
        shapes = {name: value.shape for name, value in load_file(file).items()}
        save_file({name: draw(name, shape) for name, shape in shapes.items()}, file, metadata={"format": "pt"})
        text = Path(directory, "config.json").read_text()
        model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    tokens = torch.from_numpy(draw_tokens()).long()
    logits = model(tokens).logits
    kept = {"config": np.array(json.dumps(json.loads(text))), "shapes": np.array(json.dumps(shapes))}
    kept["logits"] = logits[0].detach().numpy()
    if case in GRADIENTS:
        logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).mean().backward()
        kept |= {f"gradient/{n}": p.grad.numpy() for n, p in model.named_parameters() if p.ndim == 1}
    return {f"{case}/{name}": value for name, value in kept.items()}


def main() -> None:
    arrays = {name: value for case in CASES for name, value in golden(case).items()}
    np.savez_compressed(TESTS / "golden.npz", **arrays)
    print(TESTS / "golden.npz", (TESTS / "golden.npz").stat().st_size, "bytes")


if __name__ == "__main__":
    main()
