"""Two catalogues in, matched pairs and leftovers out; nothing is dropped silently."""
