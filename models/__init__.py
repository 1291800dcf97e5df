"""Real pretrained models by package name, and tiny seeded builders. Never imported by the machine."""
