"""From data to H: token batches, the calls of a block, the inputs of its linears, one Gram matrix per distinct input.

Knows models as streamed blocks. Must not know quantization, solvers or adapters.
"""
