"""Make a Transformer you already have faster on the machine you have."""
