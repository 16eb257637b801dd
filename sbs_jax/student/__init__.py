"""The student: T5, its loss, adapters, quantized kernels, decoding and partitioning."""
