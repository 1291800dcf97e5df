"""Raise attention by meaning, lower it through composites."""
