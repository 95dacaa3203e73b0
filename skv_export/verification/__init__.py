"""Whether an exported folder computes what its checkpoint, or the graph it was rewritten from, computes."""
