"""The factors as an ordinary PEFT adapter, the record of its base, and what to do after training (merge, convert).

It knows PEFT. It must not know solvers, calibration data or the pipeline.
"""
