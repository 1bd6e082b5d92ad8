"""Tests; a regular package so that worker processes import test modules by the same name."""
