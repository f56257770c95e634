"""Runs as one HTML page that needs nothing else: `clipo report`. Imports no torch."""
