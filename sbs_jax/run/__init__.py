"""What a run leaves on disk: directory, manifest, checkpoints, events."""
