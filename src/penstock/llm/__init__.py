"""The offline LLM class: the same engine, in process.

Owns: nothing.
Never: adds behaviour that the server lacks.
"""
