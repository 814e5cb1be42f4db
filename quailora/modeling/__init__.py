"""Checkpoints, and models of which only the block in use is in memory.

It knows transformers and safetensors. It must not know quantized weights, solvers or adapters.
"""
