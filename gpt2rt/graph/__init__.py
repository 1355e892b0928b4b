"""From weights to steps: a flat plan of fused nodes, and the executors that run a step of it."""

from .batch import StepBatch, StepOutput
from .executor import Executor, executor_names, make_executor
from .gpt2 import build_plan
from .openai_gpt import build_openai_gpt_plan
from .plan import Plan

__all__ = [
    "Executor",
    "Plan",
    "StepBatch",
    "StepOutput",
    "build_openai_gpt_plan",
    "build_plan",
    "executor_names",
    "make_executor",
]
