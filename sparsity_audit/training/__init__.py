"""Masked training: updates only where the update mask is 1, proven bit for bit."""
