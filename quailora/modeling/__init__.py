"""Checkpoints, and models with only the current block in memory.

It knows transformers and safetensors. It must not know quantized weights, solvers or adapters.
"""
