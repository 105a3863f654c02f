"""The method: towers, prompts, objectives and the one inner loop. Knows nothing of HTTP."""

__version__ = "0.1.0"
