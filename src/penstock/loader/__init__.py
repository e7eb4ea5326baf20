"""Finding and reading checkpoints: hub cache, safetensors mapping.

Owns: nothing.
Never: executes anything that came with a model.
"""
