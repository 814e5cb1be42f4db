"""From data to H: token batches, the inputs of a block, one Gram matrix per distinct input.

It knows models as streamed blocks. It must not know quantization, solvers or adapters.
"""
