"""From a plan to a variant, bottom-up."""
