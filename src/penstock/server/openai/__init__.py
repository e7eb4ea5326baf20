"""OpenAI's wire format, and vLLM's additions to it. Nothing outside this folder knows either.

Owns: nothing.
Never: imports an engine, torch; tokenizes.
"""
