"""How long Hypothesis state machines run: "quick" in the suite, ``GPT2RT_HYPOTHESIS=long`` in a night's run."""

import os

from hypothesis import HealthCheck, settings

_CHECKS = [HealthCheck.too_slow, HealthCheck.filter_too_much]
PROFILES = {
    "quick": settings(max_examples=300, stateful_step_count=50, deadline=None, suppress_health_check=_CHECKS),
    "long": settings(max_examples=10_000, stateful_step_count=200, deadline=None, suppress_health_check=_CHECKS),
}
PROFILE = os.environ.get("GPT2RT_HYPOTHESIS", "quick")
SETTINGS = PROFILES[PROFILE]
#: seconds that pytest waits for a machine
TIMEOUT = {"quick": 120, "long": 4 * 3600}[PROFILE]
