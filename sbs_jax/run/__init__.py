"""Files of a run: directory, manifest, checkpoints, events."""
