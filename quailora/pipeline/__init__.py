"""The method end to end: `build_adapter`, `initialize`, the loop over blocks, resuming, several processes.

It knows every other part but the command line. How a part does its work is that part's affair.
"""
