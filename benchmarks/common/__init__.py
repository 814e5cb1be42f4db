"""What several benchmarks need: a model, timing, tables, plots."""
