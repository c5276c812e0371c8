"""The batch engine: it answers attacks' questions, judges every point, and counts every pass."""
