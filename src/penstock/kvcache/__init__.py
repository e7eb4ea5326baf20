"""Blocks, the radix tree and the KVCacheManager.

Owns: block ids, reference counts, block tables, the prefix tree.
Never: imports torch, reads a clock.
"""

from penstock.kvcache.block_pool import BlockPool
from penstock.kvcache.manager import BlockTable, KVCacheManager, KVCacheStats, PrefixMatch
from penstock.kvcache.radix_tree import TOKEN_BYTES, RadixTree, decode_tokens, encode_tokens

__all__ = [
    "TOKEN_BYTES",
    "BlockPool",
    "BlockTable",
    "KVCacheManager",
    "KVCacheStats",
    "PrefixMatch",
    "RadixTree",
    "decode_tokens",
    "encode_tokens",
]
