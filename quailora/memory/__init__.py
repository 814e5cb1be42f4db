"""Memory: the plan of a run, its budget, and the host's allocator.

It knows shapes, and nothing of adapters or of the pipeline.
"""
