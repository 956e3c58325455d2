"""The lab: real RL fine-tuning of a small Llama on one CPU core, with everything about it known."""
