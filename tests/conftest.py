"""Eight CPU devices in every test, set before jax is first imported.

Compiling is most of what the tests cost. So XLA's CPU backend does not optimise here, which halves it, and programs
are kept for the session. Runs that a test starts as processes of their own use the settings that users have.
"""

import atexit
import os
import shutil
import tempfile

if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
    flags = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
    os.environ["XLA_FLAGS"] = " ".join(filter(None, [os.environ.get("XLA_FLAGS"), *flags]))

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="grpo_jax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
