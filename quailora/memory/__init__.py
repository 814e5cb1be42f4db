"""The memory plan of a run, its budget, and the host allocator.

It must not know adapters or the pipeline.
"""
