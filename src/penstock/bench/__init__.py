"""Measuring: a load client that does not flatter, datasets and traces, reports, replay, and the simulator.

Owns: what a run observed. Knows the HTTP of OpenAI-compatible servers from the client's side.
Never: imports torch, or reaches into the server that it measures.
"""
