"""The Triton backend: ``backend`` is what the dispatch rule sees."""
