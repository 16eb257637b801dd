"""One module per command of `sbs`: `add(command)` defines its flags, `run` calls the function that does the work.

An optional `check` comes first and refuses wrong arguments without TensorFlow and JAX (early.py).
"""
