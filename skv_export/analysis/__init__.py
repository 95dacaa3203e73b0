"""How to split the bits between keys and values, from weights and from measurements."""
