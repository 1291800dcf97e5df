"""Torch graphs: recognised through ONNX, rewritten in place as fx."""
