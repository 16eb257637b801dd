"""One module per command of `sbs`: `add(command)` defines its flags, `run` calls the function that does the work."""
