"""Interleaved timing with intervals."""
