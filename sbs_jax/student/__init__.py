"""The student: T5 or a decoder-only model, its loss, adapters, quantized kernels, decoding and partitioning."""
