"""Algorithms as lists of stages."""
