"""Refining factors along the depth: beyond each linear's own error, that of the block or of the model.

It knows a block that can be run, or a loaded model, and what it should compute; not how they are loaded, nor how Q is
made.
"""
