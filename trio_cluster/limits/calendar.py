"""Calendar periods of budgets, in UTC: days, weeks that begin on Monday, and months."""

from __future__ import annotations

import datetime

from ..core.principal import BudgetPeriod

__all__ = ["period_of"]


def period_of(per: BudgetPeriod, at: float) -> str:
    """Return the name of the calendar period that a time is in: ``2026-11-27``, ``2026-W48`` or ``2026-11``.

    Args:
        per: which kind of period.
        at: in seconds since the epoch.
    """
    day = datetime.datetime.fromtimestamp(at, datetime.UTC)
    if per == "day":
        return day.strftime("%Y-%m-%d")
    if per == "week":
        year, week, _ = day.isocalendar()
        return f"{year}-W{week:02}"
    return day.strftime("%Y-%m")
