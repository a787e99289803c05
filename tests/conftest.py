"""Eight CPU devices in every test, set before jax is first imported."""

import os

if "cpu" in os.environ.setdefault("JAX_PLATFORMS", "cpu"):
    _DEVICES = "--xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = " ".join(filter(None, [os.environ.get("XLA_FLAGS"), _DEVICES]))
