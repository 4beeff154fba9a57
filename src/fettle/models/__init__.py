"""Models: load, select modules, attention over a forest, the head."""
