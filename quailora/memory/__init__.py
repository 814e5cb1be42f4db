"""Memory: the plan of a run, its budget, and the host's allocator.

It works from shapes, and knows nothing of adapters or the pipeline.
"""
