"""Passes that simplify a traced graph."""
