"""Metrics of labels that are numbers: how far predictions are off, in float64.

Shapes: N rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

ERRORS = ("rmse", "mae")  # lower is better


def predicted(logits: np.ndarray, loss: str) -> np.ndarray:  # [N] -> float64 [N]
    """Return the predictions of a label with loss mse, huber or poisson."""
    with np.errstate(over="ignore"):
        return np.exp(logits.astype(np.float64)) if loss == "poisson" else logits.astype(np.float64)


class RegressionRows:
    """Rows whose label is a number, from which any part has its metrics.

    Args:
        labels: [N], finite.
        logits: [N].
        groups: int [N], the user of each row.
        weights: [N], above 0; None: 1 each.
        loss: mse, huber or poisson.

    Raises:
        ValueError: a prediction is not finite.
    """

    def __init__(
        self,
        labels: np.ndarray,
        logits: np.ndarray,
        groups: np.ndarray,
        weights: np.ndarray | None = None,
        loss: str = "mse",
    ) -> None:
        """Compute the predictions and check them."""
        self.label, self.scores = labels.astype(np.float64), predicted(logits, loss)
        self.group, self.weight, self.loss = groups, weights, loss
        wrong = ~np.isfinite(self.scores)
        if wrong.any():
            index = int(wrong.argmax())
            raise ValueError(
                f"prediction of row {index} is {self.scores[index]} ({wrong.sum()} of {len(wrong)} "
                "rows are not finite): the model has diverged; lower the learning rates"
            )

    def metrics(self, rows: np.ndarray | None = None) -> dict[str, Any]:  # rows: bool [N]
        """Compute the metrics of some rows, by default of all; None where they define none.

        Returns:
            rmse, mae: root mean squared and mean absolute error.
            nrmse: rmse over that of always predicting the mean, the labels' standard deviation.
            calibration, deviance: of counts: mean prediction over mean label, and mean Poisson
                deviance.
            num_samples, num_users, sum_of_weights: as in `RankedRows`.
        """
        chosen = slice(None) if rows is None else rows
        label, value, group = self.label[chosen], self.scores[chosen], self.group[chosen]
        weight = None if self.weight is None else self.weight[chosen].astype(np.float64)
        names = ["rmse", "mae", "nrmse"]
        names += ["calibration", "deviance"] if self.loss == "poisson" else []
        found: dict[str, Any] = dict.fromkeys(names)
        if len(label):
            found |= self._errors(label, value, weight)
        found |= {"num_samples": len(label), "num_users": len(np.unique(group))}
        return found if weight is None else found | {"sum_of_weights": float(weight.sum())}

    def _errors(
        self,
        label: np.ndarray,  # [n]
        value: np.ndarray,  # [n]
        weight: np.ndarray | None,  # [n]
    ) -> dict[str, float | None]:
        def mean(numbers: np.ndarray) -> float:
            return float(np.average(numbers, weights=weight))

        rmse, average = mean((value - label) ** 2) ** 0.5, mean(label)
        found: dict[str, float | None] = {"rmse": rmse, "mae": mean(np.abs(value - label))}
        deviation = mean((label - average) ** 2) ** 0.5
        found["nrmse"] = rmse / deviation if np.ptp(label) else None
        if self.loss == "poisson":
            found["calibration"] = mean(value) / average if average else None
            log_ratio = np.log(np.where(label > 0, label, 1.0)) - np.log(
                np.where(label > 0, value, 1.0)
            )
            found["deviance"] = 2 * mean(label * log_ratio - label + value)
        return found
