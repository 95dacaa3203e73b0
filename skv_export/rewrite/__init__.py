"""From another exporter's ONNX model to a folder with the quantized cache."""
