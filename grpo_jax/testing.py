"""Tiny models and data for tests, made on the spot: no network, no files."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from grpo_jax.models.hf import save_hf
from grpo_jax.models.model import Model
from grpo_jax.models.spec import ModelSpec
from grpo_jax.types import Params


def tiny_config(model_type: str = "qwen2", **overrides: Any) -> dict[str, Any]:
    """A config.json of a model of a few thousand parameters."""
    config: dict[str, Any] = {
        "model_type": model_type,
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
        "eos_token_id": 1,
    }
    return config | overrides


def tiny_model(mesh: Mesh | None = None, seed: int = 0, scale: float = 6.0, **overrides: Any) -> tuple[Model, Params]:
    """A random model whose next-token distributions are far from flat.

    Args:
        mesh: None is one device.
        seed: of the parameters.
        scale: factor on every matrix, against the flatness of a fresh model.
        overrides: fields of config.json, or of `Model` (dtype, param_dtype, remat).
    """
    fields = {name: overrides.pop(name) for name in ("dtype", "param_dtype", "remat") if name in overrides}
    model = Model(ModelSpec.from_hf(tiny_config(**overrides)), mesh=mesh, **fields)
    return model, model.scale_matrices(model.init(seed), scale)


def tiny_tokenizer() -> Any:
    """A tokenizer of single characters: pad 0, end of text 1, then digits, letters and a few signs; no template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<pad>", "<eos>", *"0123456789abcdefghijklmnopqrstuvwxyz +-=?.,:"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="?")


def tiny_checkpoint(directory: str | Path, seed: int = 0, scale: float = 3.0, **overrides: Any) -> Path:
    """Write a random model with its tokenizer as a Hugging Face directory."""
    model, params = tiny_model(seed=seed, scale=scale, **overrides)
    save_hf(model, params, directory)
    tiny_tokenizer().save_pretrained(directory)
    return Path(directory)
