"""Factors as an ordinary PEFT adapter, the record of its base, and what is done with it afterwards (merge, convert).

It knows PEFT. It must not know solvers, calibration data or the pipeline.
"""
