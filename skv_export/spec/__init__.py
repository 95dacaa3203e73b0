"""The normative part: recipe, bytes of the cache, quantizer, reference, and the cases kernels are held to."""
