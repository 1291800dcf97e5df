"""``make quality``: what rewrites do to real checkpoints at a share of the operations, beside baselines."""
