"""Writes tests/models/golden/*.npz: tiny random checkpoints with the logits and gradients of transformers.

    python scripts/make_hf_golden.py

Needs torch and transformers; nothing of grpo_jax is imported, so the files know nothing of its mistakes.
Each holds config.json as text, every tensor by its name, tokens [2, 24], logits [2, 24, V], and the gradient of the
mean log-probability of tokens[:, 1:] for every one-dimensional tensor, all float32.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS = {
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "llama": LlamaConfig(**SHAPE, head_dim=8, tie_word_embeddings=False, rope_parameters=LLAMA3),
}


def golden(config: PreTrainedConfig, seed: int) -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(1 + 0.3 * noise if "norm" in name else 0.3 * noise)
    tokens = torch.randint(0, config.vocab_size, (2, 24), generator=generator)
    logits = model(tokens).logits
    logp = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])
    logp.mean().backward()
    gradients = {f"gradient/{n}": p.grad.numpy() for n, p in model.named_parameters() if p.ndim == 1}
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        tensors = load_file(f"{directory}/model.safetensors")
        text = json.dumps(json.loads(Path(directory, "config.json").read_text()))
    arrays = {"tokens": tokens.numpy().astype(np.int32), "logits": logits.detach().numpy()}
    return arrays | gradients | {"config": np.array(text)} | {f"tensor/{n}": t for n, t in tensors.items()}


def main() -> None:
    folder = Path(__file__).resolve().parent.parent / "tests" / "models" / "golden"
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, config) in enumerate(CONFIGS.items()):
        np.savez_compressed(folder / f"{name}.npz", **golden(config, seed))
        print(folder / f"{name}.npz", (folder / f"{name}.npz").stat().st_size, "bytes")


if __name__ == "__main__":
    main()
