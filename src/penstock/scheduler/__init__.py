"""Who runs next, and how many tokens.

Owns: the waiting and running queues and every Request.
Never: imports torch, reads a clock, does I/O.
"""

from penstock.scheduler.scheduler import Scheduler

__all__ = ["Scheduler"]
