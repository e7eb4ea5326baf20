"""Metrics, start-up phases, usage records, logs.

Owns: the counters and histograms of a server, and the queue of log lines.
Never: imports torch; makes a request wait.
"""

from penstock.observability.logs import LogSink
from penstock.observability.metrics import Histogram, ServerMetrics
from penstock.observability.phases import PhaseTimer
from penstock.observability.usage import UsageLog, UsageRecord

__all__ = ["Histogram", "LogSink", "PhaseTimer", "ServerMetrics", "UsageLog", "UsageRecord"]
