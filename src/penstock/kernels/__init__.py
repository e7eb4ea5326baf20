"""The op table: one signature, a torch reference, native implementations, parity tests.

Owns: nothing (registries filled at import).
Never: knows about models or requests.
"""
