"""Text to tokens and back; the client side of an engine.

Owns: streams in flight.
Never: imports an engine, torch.
"""
