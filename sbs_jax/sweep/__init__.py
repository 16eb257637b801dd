"""Training of all cells of a table from one gin file, a few at a time; finished cells are skipped."""

from sbs_jax.sweep.cells import Cell, Group, Sweep, check_configurations, check_inputs, groups, searching
from sbs_jax.sweep.running import Ended, listed, main, run
from sbs_jax.sweep.standings import FINISHED, Standing, overview, standings, unfinished
from sbs_jax.sweep.workers import Workers

__all__ = [
    "FINISHED",
    "Cell",
    "Ended",
    "Group",
    "Standing",
    "Sweep",
    "Workers",
    "check_configurations",
    "check_inputs",
    "groups",
    "listed",
    "main",
    "overview",
    "run",
    "searching",
    "standings",
    "unfinished",
]
