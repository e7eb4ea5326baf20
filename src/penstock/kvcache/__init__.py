"""Blocks, the radix tree and the KVCacheManager.

Owns: block ids, reference counts, block tables, the prefix tree.
Never: imports torch, reads a clock.
"""
