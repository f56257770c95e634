"""CLIPO as a library (arXiv 2603.10101): pure torch, importable without Megatron.

head = ContrastiveHead(hidden_size)
loss, valid = contrastive_loss(head(pooled), correct, group)
reward = reward + contrastive_reward(loss.detach(), valid & correct)
loss.sum().div(valid.sum().clamp(min=1)).backward()  # trains the head
"""

from clipo_megatron.algorithms.clipo.head import ContrastiveHead
from clipo_megatron.algorithms.clipo.losses import contrastive_loss
from clipo_megatron.algorithms.clipo.reward import contrastive_reward

__all__ = ["ContrastiveHead", "contrastive_loss", "contrastive_reward"]
