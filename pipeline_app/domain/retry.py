"""When a failed job is tried again."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from pipeline_app.domain.durations import seconds
from pipeline_app.errors import DefinitionError, UsageError


@dataclass(frozen=True)
class Retry:
    """The retry policy of a stage.

    The n-th failure waits `backoff * 2**(n-1)`, at most `cap`, and of that a random share between `1 - jitter` and 1:
    jobs that failed together do not come back together.
    """

    #: Executions in all, the first one included.
    attempts: int = 3
    #: Wait after the first failure; a duration such as "2s".
    backoff: str | float = "1s"
    #: The longest wait.
    cap: str | float = "5m"
    #: Share of the wait that is random, 0 to 1.
    jitter: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.attempts, bool) or not isinstance(self.attempts, int) or self.attempts < 1:
            raise DefinitionError(f"retry: attempts is a whole number from 1, not {self.attempts!r}")
        if not isinstance(self.jitter, (int, float)) or not 0 <= self.jitter <= 1:
            raise DefinitionError(f"retry: jitter is between 0 and 1, not {self.jitter!r}")
        for name in ("backoff", "cap"):
            try:
                seconds(getattr(self, name))
            except UsageError as exc:
                raise DefinitionError(f"retry: {name}: {exc.message}", hint=exc.hint) from exc

    def allows(self, failures: int) -> bool:
        """Whether a job that failed `failures` times in this stage is tried again."""
        return failures < self.attempts

    def delay_s(self, failures: int, rng: random.Random | None = None) -> float:
        """Seconds to wait after the `failures`-th failure (1 is the first)."""
        # 2**60 times any backoff is beyond every cap, and keeps the power finite.
        full = min(seconds(self.cap), seconds(self.backoff) * 2.0 ** min(failures - 1, 60))
        share = (rng or random).random()
        return full * (1 - self.jitter * share)

    def definition(self) -> dict[str, Any]:
        """What the run's manifest keeps of it."""
        return {
            "attempts": self.attempts,
            "backoff_s": seconds(self.backoff),
            "cap_s": seconds(self.cap),
            "jitter": float(self.jitter),
        }
