"""Checkpoints as they come: safetensors, GGUF and hub ids, and the attention weights in them."""
