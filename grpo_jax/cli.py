"""The command line: a TOML file, `--dotted.field value` over it, one line for each error a user can cause."""

import os
import sys
from pathlib import Path

import tyro
from pydantic import ValidationError

from grpo_jax.config import TrainConfig, read_toml

USAGE = """Train a language model with group-relative policy optimization.

train.py [CONFIG.toml] [--dotted.field value ...]; without a config it runs the quickstart the package ships."""

QUICKSTART = Path(__file__).parent / "quickstart" / "quickstart.toml"
"""What runs when no config is given."""


def parse(arguments: list[str]) -> tuple[TrainConfig, str]:
    """Arguments -> the run's config and the name its directory is called after.

    Raises:
        ValueError: no such file, or an illegal value, by its dotted path.
        SystemExit: after --help, or when an option does not parse; what was wrong is printed.
    """
    arguments = [{"none": "None", "true": "True", "false": "False"}.get(a, a) for a in arguments]
    given = arguments and not arguments[0].startswith("-")
    file = Path(arguments.pop(0)) if given else QUICKSTART
    tables, name = read_toml(file), file.stem
    preset = _option(arguments, "--algorithm.preset")
    if preset is not None:
        # The preset decides what the other fields of its table default to, so it is read before they are.
        tables["algorithm"] = tables.get("algorithm", {}) | {"preset": preset}
    try:
        default = TrainConfig.from_tables(tables)
        config = tyro.cli(
            TrainConfig,
            default=default,
            args=arguments,
            description=USAGE,
            use_underscores=True,
            config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
        )
    except ValidationError as error:
        raise ValueError(describe(error)) from error
    return config, name


def describe(error: ValidationError) -> str:
    """One line a wrong field: its dotted path, what was got, why it cannot be."""
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        known = "" if item["type"] != "extra_forbidden" else "; --help lists the fields"
        got = "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"
        lines.append(f"{path}: {message}{got}{known}" if path else message)
    return "\n".join(lines)


def _option(arguments: list[str], name: str) -> str | None:
    for i, argument in enumerate(arguments):
        if argument == name and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(name + "="):
            return argument.partition("=")[2]
    return None


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would regret the absence of PyTorch
    try:
        config, name = parse(arguments)
        if config.deterministic:
            flags = os.environ.get("XLA_FLAGS", "")
            os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
        from grpo_jax.trainer import Trainer

        Trainer(config=config, name=name).train()
    except (ValueError, OSError) as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print("interrupted; the same command with --output_dir goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0
