"""The rerank format that Cohere and Jina share.

Owns: nothing; a request's state lives in its call.
Never: knows another protocol's format.
"""
