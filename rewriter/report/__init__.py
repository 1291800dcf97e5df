"""JSON (the truth) and Markdown drawn from it."""
