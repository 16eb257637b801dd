"""Training: configuration, step, loop, evaluation."""
