"""Train: `python scripts/train.py [CONFIG.toml] [--dotted.field value ...]`; `--help` shows every field."""

import sys

from grpo_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
