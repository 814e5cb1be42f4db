"""What a run tells people: progress, report, model card, and the record beside an adapter.

It must not know how any of it was computed.
"""
