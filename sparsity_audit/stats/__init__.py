"""Pure statistics: counts in, records out; no file, no kernel, no printing."""
