"""A student for other runtimes: what it was trained to do (card.py), StableHLO, ONNX, and weights in fewer bits."""
