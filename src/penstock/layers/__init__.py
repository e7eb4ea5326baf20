"""Parts that models are made of: linear, attention, norm, rotary.

Owns: its weights.
Never: knows about requests.
"""
