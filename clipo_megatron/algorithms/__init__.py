"""Algorithms as lists of hooks."""
