"""What a reward's process gets from the one that starts it: where to look for modules, and environment variables."""

import os
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The folder that grpo_jax lies in."""

ONE_THREAD = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "RAYON_NUM_THREADS",
)
"""Libraries start a thread a core otherwise, in each of many processes beside a run that uses the cores itself."""

_SECRET_NAME = re.compile(
    r"PASSWORD|PASSWD|PASSPHRASE|SECRET|CREDENTIAL|APIKEY|(^|_)(TOKENS?|KEYS?|AUTH|PAT|COOKIE)(_|$)|_(PWD|PASS)(_|$)",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(r"://[^/\s@]*:[^/\s@]+@")  # a URL with a password


def withheld(environment: Mapping[str, str], given: Collection[str] = ()) -> list[str]:
    """Names of the variables that a reward's process does not get: tokens, keys and the like.

    Args:
        environment: of this process.
        given: names that it gets all the same.

    >>> withheld({"HF_TOKEN": "x", "PATH": "/bin", "TOKENIZERS_PARALLELISM": "1", "DB": "db://me:pass@host"})
    ['HF_TOKEN', 'DB']
    """
    secret = (name for name, value in environment.items() if _SECRET_NAME.search(name) or _SECRET_VALUE.search(value))
    return [name for name in secret if name not in given]


def environment_for(environment: Mapping[str, str], given: Collection[str] = ()) -> dict[str, str]:
    """The environment of a reward's process; a library's threads are one where nobody set their number."""
    kept = set(environment) - set(withheld(environment, given))
    return dict.fromkeys(ONE_THREAD, "1") | {name: value for name, value in environment.items() if name in kept}


def import_path() -> list[str]:
    """Where a reward's process looks for modules: as this one does, but a library comes before what lies around.

    The working directory and the folder of the running script are on ``sys.path`` because of how the program was
    started, not because someone asked for them, so they come last; what PYTHONPATH names stays where it is. The
    scripts of this project are no modules and are left out.
    """
    asked = {os.path.realpath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry}
    started = {os.path.realpath(""), os.path.realpath(os.path.dirname(_main_file()))} - asked
    scripts = os.path.realpath(ROOT / "scripts")
    entries = [entry or os.path.realpath("") for entry in sys.path]
    entries = [entry for entry in entries if os.path.realpath(entry) != scripts or scripts in asked]
    by_accident = [entry for entry in entries if os.path.realpath(entry) in started]
    path = [entry for entry in entries if entry not in by_accident] + by_accident
    return path if str(ROOT) in path else [*path, str(ROOT)]


def _main_file() -> str:
    return str(getattr(sys.modules.get("__main__"), "__file__", None) or "")
