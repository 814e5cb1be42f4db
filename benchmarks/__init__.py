"""Measurements; each script prints a table, and can write JSON."""
