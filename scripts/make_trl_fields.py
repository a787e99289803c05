"""Writes tests/trl_fields.txt: every field of TRL's GRPOConfig and every argument of its GRPOTrainer.

    python scripts/make_trl_fields.py > tests/trl_fields.txt

Needs trl (1.16.0 made the committed file) in the environment that runs it; docs/FROM_TRL.md has to have a row for each.
"""

import dataclasses
import inspect

import trl

print(f"# trl {trl.__version__}, by scripts/make_trl_fields.py")
for field in dataclasses.fields(trl.GRPOConfig):
    print("config", field.name)
for name in list(inspect.signature(trl.GRPOTrainer.__init__).parameters)[1:]:
    print("trainer", name)
