"""Reinforcement learning algorithms, each of which is a list of hooks (`hook.py`)."""
