"""Teacher models: prompts, clients, limits, the store of replies, and the records made from them."""
