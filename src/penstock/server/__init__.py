"""HTTP. Each wire format is known in exactly one folder.

Owns: HTTP connections.
Never: imports an engine, torch.
"""
