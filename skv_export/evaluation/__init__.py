"""What a quantizer of the cache loses, measured in PyTorch."""
