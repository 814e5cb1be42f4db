"""What a run tells people: progress, report, model card, and the record in an adapter's folder.

It must not know the pipeline, nor how a solver works.
"""
