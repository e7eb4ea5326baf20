"""text-generation-inference's wire format, as huggingface_hub.InferenceClient speaks it. Nothing outside knows it.

Owns: nothing.
Never: imports an engine, torch; tokenizes.
"""
