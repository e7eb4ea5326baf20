"""How a weight format is stored, repacked and multiplied; one file a format.

Owns: nothing.
Never: knows about models.
"""
