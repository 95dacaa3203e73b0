"""Exported models in transformers, lm-eval and optimum."""
