"""Metrics, start-up phases, usage records, logs.

Owns: the counters and histograms of a server, and the queue of log lines.
Never: imports torch; makes a request wait.
"""
