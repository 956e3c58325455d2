"""Bytes and names of checkpoints, without torch: open a reference, list tensors, read ranges."""
