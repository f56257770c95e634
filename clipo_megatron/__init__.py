"""Contrastive policy optimisation (CLIPO) for reinforcement learning with verifiable rewards, on Megatron."""

__version__ = "0.1.0"
