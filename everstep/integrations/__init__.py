"""Checkpoints and snapshots in the training loops of other libraries."""
