"""Ollama's wire format: /api/... Nothing outside this folder knows it.

Owns: nothing.
Never: imports an engine, torch; tokenizes.
"""
