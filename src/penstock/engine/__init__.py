"""One loop: receive, schedule, launch, update, send.

Owns: the loop.
Never: knows text or wire formats.
"""
