"""The model behind one protocol: loading, checks, running in torch."""
