"""Whether an exported folder computes what PyTorch computes."""
