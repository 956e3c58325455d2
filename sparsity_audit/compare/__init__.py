"""Arrays in, mask bits and tallies out: one reference and three kernels that equal it exactly."""
