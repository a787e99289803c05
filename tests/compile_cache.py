"""The compilation cache of the tests: one for all runs, workers and processes that they start, kept between runs.

A folder of it is for one jax, one set of XLA's flags and one kind of processor. JAX writes a program in place, so that
another process could read half of it, and a killed one would leave half of it for ever: here it is written beside its
place and renamed.
"""

import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path

MAX_BYTES = 3 * 2**30
"""From this size on, the programs written longest ago are deleted when a run starts."""


def configure() -> None:
    """Set JAX's environment, before it is imported; a cache that the environment names is taken as it is."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grpo_jax-tests"
        facts = [version("jax"), version("jaxlib"), os.environ.get("XLA_FLAGS", ""), platform.machine(), processor()]
        place = root / hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError:  # no home to write to: every program is compiled anew
            return
        if "PYTEST_XDIST_WORKER" not in os.environ:
            prune(root)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(place)
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def processor() -> str:
    """What the processor can do, as far as Linux says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def prune(root: Path) -> None:
    """Delete what was written longest ago, until at most MAX_BYTES are left."""
    found = []
    for path in root.rglob("*"):
        try:
            if path.is_file():
                found.append((path.stat().st_mtime, path.stat().st_size, path))
        except FileNotFoundError:
            continue
    size = sum(size for _, size, _ in found)
    for _, one, path in sorted(found):
        if size <= MAX_BYTES:
            break
        path.unlink(missing_ok=True)
        size -= one


def write_by_rename() -> None:
    """Make JAX's cache write a program beside its place and rename it."""
    from jax._src import lru_cache

    def put(self: lru_cache.LRUCache, key: str, value: bytes) -> None:
        place = Path(self._path) / f"{key}-cache"
        if not place.exists():
            beside = place.with_name(f"{key}.{os.getpid()}.part")
            try:
                beside.write_bytes(value)
                beside.replace(place)
            except OSError:  # a full disk: nothing is kept
                beside.unlink(missing_ok=True)

    lru_cache.LRUCache.put = put  # type: ignore[method-assign]
