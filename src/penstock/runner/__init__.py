"""Executes one step: input batch, model, sampler.

Owns: device rows, KV tensors.
Never: decides who runs.
"""
