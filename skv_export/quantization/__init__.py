"""What is fitted to a text that a model reads, layer by layer: weights in few bits, and bases of calibrated keys."""
