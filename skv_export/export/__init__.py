"""From a checkpoint to an ONNX folder."""
