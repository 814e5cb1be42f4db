"""From data to H: token batches, blocks that run on them, the inputs of their linears, one Gram matrix per distinct
input; alone or shared by several processes.

It knows models as streamed blocks. It must not know quantization, solvers or adapters.
"""
