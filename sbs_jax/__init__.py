"""Distilling Step-by-Step for JAX: T5 students that learn from a teacher's rationales."""

__version__ = "0.1.0"
