"""What a model wrote, taken apart as it comes: content, reasoning, tool calls. One file a format, no I/O.

Owns: the state of the parses in progress.
Never: loses text a model wrote; takes more than linear time; reads a format's choice from a flag.
"""
