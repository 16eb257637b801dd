"""Asking a teacher model: prompts, clients, limits, the store of replies, and records made from them."""
