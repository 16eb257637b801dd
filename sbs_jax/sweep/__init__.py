"""Training of all cells of a table from one gin file, a few at a time; finished cells are skipped."""

from sbs_jax.sweep.cells import Cell, Sweep, check_configurations, check_inputs, searching
from sbs_jax.sweep.running import Ended, main, run
from sbs_jax.sweep.standings import Standing, overview, standings, unfinished
from sbs_jax.sweep.workers import Workers

__all__ = [
    "Cell",
    "Ended",
    "Standing",
    "Sweep",
    "Workers",
    "check_configurations",
    "check_inputs",
    "main",
    "overview",
    "run",
    "searching",
    "standings",
    "unfinished",
]
