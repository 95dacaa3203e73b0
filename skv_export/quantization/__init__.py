"""Weights of few bits, fitted to what the layers read: a float checkpoint becomes a quantized one."""
