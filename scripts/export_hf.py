"""Write a checkpoint of a run as a Hugging Face directory.

    python scripts/export_hf.py RUN [--step K] [--out DIR] [--dtype bfloat16 | --peft]

RUN is the run's directory; K a step that it kept, by default the newest. DIR is by default RUN/hf-K. The tensors have
the dtype of the model that the run started from, or --dtype; config.json, tokenizer, chat template and
generation_config.json are copied from it, but for a chat template of the run's own (data.chat_template). Adapters
(model.lora) are merged into it, or with --peft written as a directory that the peft library loads.
"""

import argparse
import sys
from pathlib import Path

from grpo_jax.checkpoint import CheckpointStore
from grpo_jax.config import TrainConfig
from grpo_jax.data import read_template, resolve_model
from grpo_jax.learner.learning import adapted
from grpo_jax.manifest import ABSENT
from grpo_jax.models import read_model, save_hf, save_peft
from grpo_jax.rundir import CHECKPOINTS, CONFIG


def export(
    run: Path, step: int | None = None, out: Path | None = None, dtype: str | None = None, peft: bool = False
) -> Path:
    """Write the checkpoint of ``step`` (default: the newest) to ``out`` (default: run/hf-step); returns where."""
    if not (run / CONFIG).is_file() or not (run / CHECKPOINTS).is_dir():
        raise ValueError(f"{run}: got a directory without {CONFIG} and {CHECKPOINTS}; it is no run; check the path")
    config = TrainConfig.from_toml(run / CONFIG)
    source = resolve_model(config.model.path, config.model.revision)
    model = adapted(read_model(source, param_dtype=config.model.param_dtype), config.model.lora)
    store = CheckpointStore(run, keep=None)
    steps = store.steps()
    if (step is not None and step not in steps) or not steps:
        listed = ", ".join(map(str, steps)) or "none"
        raise ValueError(f"{run}: got no checkpoint of step {step}; there are: {listed}; give one of them as --step")
    step = _sound(store, run, step)
    target = run / f"hf-{step}" if out is None else out
    trained = store.restore_params(step, model.trained(model.abstract_params))
    if peft:
        save_peft(model, trained, target, base=str(source))
    else:
        for line in () if model.lora is None else store.check_reference():
            print(f"warning: {line}", file=sys.stderr)
        frozen = None if model.lora is None else store.restore_reference(model.base.abstract_params)
        template = read_template(config.data)
        save_hf(model, model.joined(trained, frozen), target, source=source, dtype=dtype, chat_template=template)
    store.close()
    return target


def _sound(store: CheckpointStore, run: Path, step: int | None) -> int:
    """The step to write, by default the newest sound one; what is not sound is said."""
    if step is None:
        found = store.newest_sound()
        for line in found.lines():
            print(f"warning: {line}", file=sys.stderr)
        assert found.step is not None  # there are steps
        return found.step
    if (wrong := store.fault(step)) == ABSENT:
        print(f"warning: the checkpoint of step {step} {wrong}; it may not be whole", file=sys.stderr)
    elif wrong is not None:
        raise ValueError(f"{run}: the checkpoint of step {step} is damaged ({wrong}); give another --step")
    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of a run")
    parser.add_argument("--step", type=int, help="a step that the run kept; default: the newest")
    parser.add_argument("--out", type=Path, help="directory to write; default: RUN/hf-STEP")
    parser.add_argument("--dtype", help="of the tensors; default: that of the model the run started from")
    parser.add_argument("--peft", action="store_true", help="write the adapters alone, for the peft library")
    arguments = parser.parse_args()
    try:
        print(export(arguments.run, arguments.step, arguments.out, arguments.dtype, arguments.peft))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
