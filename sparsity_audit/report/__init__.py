"""Records and their renderings: terminal, JSON, CSV, Markdown."""
