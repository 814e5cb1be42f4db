"""The factors as an ordinary PEFT adapter, the record of its base, the base on disk, and what to do after training
(merge, convert, export).

It knows PEFT and the factors that solvers return. It must not know how they are found, nor the pipeline.
"""
