"""Quantized bases: the protocol, and one file for each library of quantization.

It knows weights and modules. It must not know solvers, data or adapters.
"""
