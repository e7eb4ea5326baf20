"""Executes one step: input batch, model, sampler.

Owns: device rows, KV tensors.
Never: decides who runs.
"""

from penstock.runner.memory import MemoryPlan, plan_memory, plan_profiled
from penstock.runner.model_runner import ModelRunner

__all__ = ["MemoryPlan", "ModelRunner", "plan_memory", "plan_profiled"]
