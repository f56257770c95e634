"""A folder for the PYTHONPATH of an SGLang server on a machine without a GPU, where its packages for GPUs and images are
absent: SGLang imports names from them at start, whatever it serves, and with its CPU settings it uses none of them.
"""
