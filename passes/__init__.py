"""The rewrites: one file, one class, one test each."""
