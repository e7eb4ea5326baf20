"""Anthropic's wire format: /v1/messages. Nothing outside this folder knows it.

Owns: nothing.
Never: imports an engine, torch; tokenizes.
"""
