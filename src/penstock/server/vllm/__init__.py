"""vLLM's formats for scoring pairs of texts and for classifiers.

Owns: nothing; a request's state lives in its call.
Never: knows another protocol's format, but for the errors, which are OpenAI's here too.
"""
