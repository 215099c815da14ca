"""Differences between a run and one that is warm-started from it, each with the rule for it."""

from __future__ import annotations

from dataclasses import dataclass, field

MOST_FAULTS = 12  # in one message


@dataclass(frozen=True)
class Difference:
    """One difference: of which part, what it is, and what the new run has."""

    part: str
    what: str
    rule: str


@dataclass
class Differences:
    """Differences that a rule reconciles, and faults: those that none does."""

    reconciled: list[Difference] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def add(self, part: str, what: str, rule: str) -> None:
        """Add a difference with its rule."""
        self.reconciled.append(Difference(part, what, rule))

    def refuse(self, part: str, what: str, fix: str) -> None:
        """Add a difference that cannot be reconciled, with what would help."""
        self.faults.append(f"{part}: {what}; {fix}")

    def check(self, folder: object) -> None:
        """Raise a ValueError that lists the faults, if there are any."""
        if self.faults:
            listed = self.faults[:MOST_FAULTS]
            if more := len(self.faults) - len(listed):
                listed.append(f"and {more} more")
            raise ValueError(f"{folder}: this model cannot start from it: {'. '.join(listed)}")

    def __str__(self) -> str:
        """Return the reconciled differences as a table of text."""
        if not self.reconciled:
            return "nothing differs"
        rows = [("part", "difference", "in this run")]
        rows += [(each.part, each.what, each.rule) for each in self.reconciled]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        return "\n".join(
            f"{part:<{widths[0]}}  {what:<{widths[1]}}  {rule}" for part, what, rule in rows
        )
