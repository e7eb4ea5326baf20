"""Errors, logging and facts about the machine: what every other package may use.

Owns: nothing.
Never: imports another package of Penstock, or torch.
"""
