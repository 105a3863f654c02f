"""The wire: HTTP in front of `gram_core`. It holds limits, queueing and formats, and no mathematics."""
