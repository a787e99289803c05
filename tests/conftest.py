"""Eight CPU devices in every test, set before jax is first imported.

Compiling is most of what the tests cost. So XLA's CPU backend does not optimise here, and emits loops the plain way
and on one thread, which leaves a quarter of it; programs are kept on disk (compile_cache.py). Runs that a test starts
as processes of their own use the settings that users have.
"""

import gc
import mmap
import os
import signal
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import compile_cache
import pytest
from durations import Durations
from hypothesis import HealthCheck, settings

QUICK = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
"""Flags of XLA that halve what compiling costs at optimisation level 0. They are no promise of XLA's."""


PATIENT = ("--xla_cpu_collective_call_terminate_timeout_seconds=600",)
"""A busy machine is slow to bring eight devices together, which XLA takes for a fault after 40 seconds."""


def known(flags: tuple[str, ...]) -> list[str]:
    """Those that jaxlib's library knows: one that it does not know would end the process."""
    found = find_spec("jaxlib")
    library = Path(next(iter(found.submodule_search_locations or ()))) / "libjax_common.so" if found else None
    if library is None or not library.exists():
        return []
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        names = {flag: flag.strip("-").partition("=")[0].encode() for flag in flags}
        return [flag for flag, name in names.items() if text.find(b"\0" + name + b"\0") >= 0]  # whole, as a flag's is


if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
    flags = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0", *known(QUICK + PATIENT)]
    # Devices may begin a program's independent collectives in different orders, each of which holds a thread until all
    # devices have come to it: with XLA's one thread a device they can wait for each other for ever.
    os.environ.setdefault("PJRT_NPROC", "64")
    os.environ["XLA_FLAGS"] = " ".join(filter(None, [os.environ.get("XLA_FLAGS"), *flags]))

compile_cache.configure()

# What runs in a shell's background ignores Ctrl-C, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A test's verdict does not hang on how busy the machine is.
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")

MOST_MAPS = 16_000
"""Memory maps at which a process gives its programs back: a quarter of what Linux allows one by default."""


@pytest.fixture(autouse=True, scope="module")
def _programs_are_given_back() -> Iterator[None]:
    """Forget what was compiled, now and then, between two test files.

    Every program compiled for the CPU holds three memory maps per object file. A process that has compiled thousands
    reaches ``vm.max_map_count`` (65,530), and the next one to be compiled or loaded is a segmentation fault.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        import jax

        if "grpo_jax.rollout.engine" in sys.modules:
            sys.modules["grpo_jax.rollout.engine"].PROGRAMS.clear()
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def one_device() -> Iterator[None]:
    """Let the runs of a file have one device, where eight would only be compiled for longer."""
    import jax

    from grpo_jax.mesh import make_mesh

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grpo_jax.trainer.make_mesh", lambda *sizes: make_mesh(*sizes, devices=jax.devices()[:1]))
        yield


def pytest_configure(config: pytest.Config) -> None:
    """Measure where the time goes; keep programs safely where several processes test."""
    compile_cache.write_by_rename()
    durations = Durations(config)
    durations.install()
    config.pluginmanager.register(durations, "durations-by-kind")
