"""Export of a student to other forms and runtimes: checkpoints, StableHLO, ONNX, and the card that goes along."""
