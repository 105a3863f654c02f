"""Hierarchies and prototypes as float32 arrays. Knows no model, no torch and no HTTP."""
