"""Metrics, start-up phases, usage records.

Owns: metric registries.
Never: imports torch.
"""
