"""The keeper: a process of its own that owns the memory of snapshots, and outlives the trainers."""
