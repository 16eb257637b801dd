"""Results of runs: accuracies, intervals and comparisons."""
