"""One flat file a family.

Owns: its weights.
Never: knows about requests.
"""
