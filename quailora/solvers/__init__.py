"""From W, Q and H to the factors A and B.

Tensors only: it must not know models, adapters, data or quantization libraries.
"""
