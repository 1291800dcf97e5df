"""The nouns of the optimizer: plain data, numpy at most, no framework."""
