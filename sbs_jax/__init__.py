"""Distilling Step-by-Step for JAX: small T5 students that learn from a teacher's labels and rationales."""

__version__ = "0.1.0"
