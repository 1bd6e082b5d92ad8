"""Snapshots: the state of every step in memory, captured beside training and flushed later."""
