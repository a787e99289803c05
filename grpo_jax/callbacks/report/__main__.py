"""``python -m grpo_jax.callbacks.report RUN``: write a run's report.html again."""

import argparse
import sys

from grpo_jax.callbacks.report import write_report


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m grpo_jax.callbacks.report", description=write_report.__doc__)
    parser.add_argument("run", help="directory of a run")
    try:
        print(write_report(parser.parse_args(arguments).run))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
