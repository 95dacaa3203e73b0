"""What is fitted to a text that a model reads, layer by layer: weights in few bits, and the bases of calibrated keys."""
