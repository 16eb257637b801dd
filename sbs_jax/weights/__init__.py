"""Weights in any form: runs, Hugging Face, T5X, PEFT, NumPy. `opening.py` has the table."""
