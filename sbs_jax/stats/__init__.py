"""Results of runs, intervals and comparisons, as numbers."""
