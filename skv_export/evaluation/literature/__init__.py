"""Caches of the literature with their published arithmetic, a file for each; `baselines.py` gives them names."""
