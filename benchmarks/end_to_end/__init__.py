"""Whole runs: time, memory, quality."""
