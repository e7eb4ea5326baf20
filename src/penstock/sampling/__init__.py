"""From logits to tokens: penalties, filters, draws, log-probabilities.

Owns: nothing.
Never: knows about the scheduler.
"""
