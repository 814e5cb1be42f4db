"""Refining factors along the depth: beyond each linear's own error, that of the block.

It knows a block that can be run, and what it should compute; not how blocks are loaded, nor how Q is made.
"""
