"""Kernel templates: plain TIR built by the IRBuilder (no parsing), parametrised by shape, lanes and epilogue."""
