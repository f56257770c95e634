"""A folder for the PYTHONPATH of an SGLang server on a machine without a GPU.

At its start SGLang imports names from packages for GPUs and images, which it does not use on a CPU. The modules in this
folder take the place of these packages, which are not installed.
"""
