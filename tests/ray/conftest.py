"""A small corpus and a small run; the cluster is in ``tests/conftest.py``."""

from tests.e2e.conftest import small_run

__all__ = ["small_run"]
