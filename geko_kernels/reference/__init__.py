"""The truth for every op: plain PyTorch, on any device, and slow."""
