"""The student: T5, its loss, its adapters, its decoding, and where its arrays live."""
