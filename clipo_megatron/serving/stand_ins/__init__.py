"""A folder for the PYTHONPATH of an SGLang server on a machine without a GPU.

SGLang imports names from packages for GPUs and images at start, whatever it serves; with its CPU settings it uses none
of them. They are not installed there: what is in this folder takes their places.
"""
