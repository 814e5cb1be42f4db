"""Triton kernels of quailora, imported as `quailora.kernels`.

Keep this file empty but for this docstring: with the clone's root on `sys.path`, it is what transformers' `import
kernels`, meant for the Hugging Face package of that name, runs.
"""
