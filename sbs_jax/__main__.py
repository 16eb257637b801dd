"""`python -m sbs_jax`: the `sbs` command."""

import sys

from sbs_jax.cli.main import command

sys.exit(command())
