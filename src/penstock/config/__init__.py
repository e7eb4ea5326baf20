"""Settings and model configurations: resolved once, then frozen.

Owns: nothing.
Never: imports torch; reads the environment outside settings.py.
"""
