"""Causal language models behind one protocol: loading, sampling with a cache, scoring in chunks."""
