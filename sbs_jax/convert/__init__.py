"""Checkpoints of Hugging Face and T5X, read and written: one table of names, arrays one at a time."""
