"""Triton kernels of quailora, imported as `quailora.kernels`.

Nothing but this docstring may stand here: with the clone's root on `sys.path`, transformers' `import kernels`, which
means the Hugging Face package of that name, runs this file.
"""
