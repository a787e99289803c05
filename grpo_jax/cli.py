"""The command line: a TOML file, `--dotted.field value` over it, one line for each error a user can cause."""

import logging
import os
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from platform import python_version

from grpo_jax.config import TrainConfig, read_toml
from grpo_jax.config.arguments import Command, merge, read_command, show_help
from grpo_jax.functions import hide_no_library, printable
from grpo_jax.interrupt import Interrupted, command_to_go_on
from grpo_jax.rundir import no_space, what_is_safe

USAGE = """Train a language model with group-relative policy optimization.

  train.py [CONFIG.toml] [--dotted.field value ...]

Without a config it runs the quickstart the package ships. Values are written
as in TOML, without quotes: "none" is no value, a list is several words, and a
field that takes a TABLE can be set key by key (--data.eval.NAME FILE). A text
that begins with -- is written --field=TEXT. In brackets: the value that holds
when the field is not given.

  --help [TABLE ...]  show all fields, or those of some tables (--help optim);
                      with a config, the values it gives
  --debug             show the traceback of an error
  --version           show the versions of this package and of Python
  --quiet             the same as --log.quiet"""

LESS_MEMORY = (
    "set optim.microbatch_rows or model.remat, or lower rollout.slots, rollout.prompts_per_step, rollout.num_samples "
    "or rollout.max_new_tokens"
)
"""What to do where memory ran out; docs/scaling.md says what each costs."""

QUICKSTART = Path(__file__).parent / "quickstart" / "quickstart.toml"
"""What runs when no config is given."""


def parse(arguments: list[str]) -> tuple[TrainConfig, str]:
    """Arguments -> the run's config and the name its directory is called after.

    Raises:
        ValueError: no such file, or an illegal value, by its dotted path; a line for each.
    """
    return _resolve(read_command(arguments, TrainConfig))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status: 0 done, 1 failed, 2 wrong usage, 128 and the signal's number interrupted."""
    command = list(sys.argv if arguments is None else ["train.py", *arguments])
    hide_no_library()
    try:
        if command[1:] == ["--version"]:
            print(f"grpo_jax {version('grpo_jax')}, Python {python_version()}")
            return 0
        asked = read_command(command[1:], TrainConfig)
        if asked.help:
            return _help(asked)
        _train(*_resolve(asked), asked.debug)
    except Interrupted as stopped:
        _say(f"{stopped.summary}; to go on:\n  {command_to_go_on(command, stopped.directory)}")
        return stopped.status
    except KeyboardInterrupt as stopped:
        _say("\n".join(["interrupted at once", *_notes(stopped)]))
        return 130
    except Exception as error:
        if "--debug" in command:
            traceback.print_exc()
        _say("\n".join([f"error: {line}" for line in _lines(error)] + _notes(error)))
        return 2 if isinstance(error, ValueError) and no_space(error) is None else 1
    return 0


def in_a_line(work: Callable[[], None]) -> int:
    """Do the work of another command; its exit status, as of `main`. An error is a line on standard error."""
    hide_no_library()
    try:
        work()
    except KeyboardInterrupt:
        _say("")
        return 130
    except BrokenPipeError:  # whoever read has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except Exception as error:
        _say("\n".join(f"error: {line}" for line in _lines(error)))
        return 2 if isinstance(error, ValueError) else 1
    return 0


def _resolve(asked: Command) -> tuple[TrainConfig, str]:
    file = QUICKSTART if asked.file is None else Path(asked.file)
    return TrainConfig.from_tables(merge(read_toml(file), asked.tables)), file.stem


def _help(asked: Command) -> int:
    from rich.console import Console

    show_help(Console(), USAGE, _resolve(asked)[0] if asked.file else TrainConfig(), asked.topics)
    return 0


def _train(config: TrainConfig, name: str, debug: bool) -> None:
    from grpo_jax.callbacks import Callback, Run
    from grpo_jax.trainer import Trainer

    if not debug:
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # a checkpoint's writer logs the traceback of its error

    class Place(Callback):
        directory: Path | None = None

        def on_start(self, run: Run) -> None:
            self.directory = run.directory

    place = Place()
    try:
        Trainer(config=config, callbacks=[place], name=name).train()
    except BaseException as error:
        if place.directory is not None and (safe := what_is_safe(place.directory)):
            error.add_note(f"{safe}; --output_dir {place.directory} goes on there")
        if isinstance(error, OSError) and error.filename is None and place.directory is not None:
            error.filename = str(place.directory)  # a write that fails does not say to which file
        raise


def _lines(error: Exception) -> list[str]:
    """The lines for an error; one nobody foresaw is ours, and says where it came from."""
    full = no_space(error) or _no_memory(error)
    if full is not None:
        return [full]
    if isinstance(error, ValueError):
        return str(error).splitlines() or ["ValueError without a word; --debug shows where"]
    if isinstance(error, OSError):
        return [f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")]
    own = Path(__file__).parent
    frames = [f for f in traceback.extract_tb(error.__traceback__) if own in Path(f.filename).parents]
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    said = " ".join(str(error).split())[:300]
    return [
        f"{type(error).__name__}{place}: {said} (this is a bug, or a machine in trouble; "
        "the same command with --debug shows the traceback: please report it)"
    ]


def _no_memory(error: BaseException | None) -> str | None:
    """The line for an error that comes, at whatever remove, from memory that ran out; None for any other."""
    while error is not None:
        said = " ".join(str(error).split())
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in said:
            return f"out of memory ({said[:200] or 'the host has no more'}); {LESS_MEMORY}"
        error = error.__cause__ or error.__context__
    return None


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", ()))  # what `add_note` fills; an error without notes has no such field


def _say(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)  # it may hold words of strangers
