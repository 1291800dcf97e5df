"""Data in, streaming statistics out."""
