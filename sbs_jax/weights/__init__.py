"""Weights of other forms: Hugging Face, T5X, PEFT, NumPy; opening any of them."""
