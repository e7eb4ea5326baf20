"""The penstock command.

Owns: nothing.
Never: imports heavy packages at the top level.
"""
