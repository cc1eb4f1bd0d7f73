"""Calendar periods of budgets, in UTC: days, weeks that begin on Monday, and months."""

from __future__ import annotations

import datetime
from functools import lru_cache
from typing import Final

from ..core.principal import BudgetPeriod

__all__ = ["period_of"]

_EPOCH: Final = datetime.date(1970, 1, 1).toordinal()


def period_of(per: BudgetPeriod, at: float) -> str:
    """Return the name of the calendar period that a time is in: ``2026-11-27``, ``2026-W48`` or ``2026-11``.

    Args:
        per: which kind of period.
        at: in seconds since the epoch.
    """
    return _period(per, int(at // 86_400))


# Cached, since it is the same for a whole day.
@lru_cache(maxsize=16)
def _period(per: BudgetPeriod, days: int) -> str:
    day = datetime.date.fromordinal(_EPOCH + days)
    if per == "day":
        return day.strftime("%Y-%m-%d")
    if per == "week":
        year, week, _ = day.isocalendar()
        return f"{year}-W{week:02}"
    return day.strftime("%Y-%m")
