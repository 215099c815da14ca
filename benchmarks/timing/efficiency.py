"""A measured step beside its roofline: the time of each part, and the least it could take."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.timing.rounds import Measurement
from recsys.diagnostics.cost.batch_counts import BatchCounts
from recsys.diagnostics.cost.roofline import Anchor, typical
from recsys.diagnostics.cost.step_costs import roofline_by_measured_part, step_costs
from recsys.diagnostics.cost.work import PartCost


@dataclass
class Efficiency:
    """A measured step beside its cost on the first rank."""

    costs: list[PartCost]
    anchor: Anchor
    rooflines: dict[str, float]  # seconds by measured part
    seconds: dict[str, float]  # by measured part, from the profile, scaled to the plain step

    @staticmethod
    def of(measured: Measurement) -> Efficiency:
        """Compute costs and rooflines of a measurement."""
        report = measured.reports[0]
        assert report.sizes is not None
        costs = step_costs(report.sizes, BatchCounts.mean(report.counts), measured.world_size)
        anchor = typical(measured.anchors)
        return Efficiency(
            costs, anchor, roofline_by_measured_part(costs, anchor), plain_parts(measured)
        )

    @property
    def roofline(self) -> float:
        """Roofline of the whole step in seconds."""
        return sum(self.rooflines.values())

    @property
    def lost(self) -> dict[str, float]:
        """Seconds above the roofline by measured part, the most first."""
        above = {
            part: seconds - self.rooflines.get(part, 0.0) for part, seconds in self.seconds.items()
        }
        return dict(sorted(above.items(), key=lambda item: -item[1]))

    def share(self, measured: Measurement) -> float:
        """Return the roofline's share of the step."""
        return self.roofline / measured.step_seconds


def plain_parts(measured: Measurement) -> dict[str, float]:
    """Return seconds by part without the profiler's overhead: its shares, of the median step."""
    parts = {name: value["median"] for name, value in measured.profile["parts"].items()}
    total = sum(parts.values())
    return {name: seconds / total * measured.step_seconds for name, seconds in parts.items()}
