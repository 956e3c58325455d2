"""Update masks: packed bits, their algebra, the mask directory, and other encodings."""
