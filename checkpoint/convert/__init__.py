"""Conversion between checkpoints of everstep and other formats."""
