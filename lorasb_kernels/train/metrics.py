"""Metrics of predicted classes and scores."""

from collections.abc import Sequence

import torch


def accuracy(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """Share of predictions that equal their label."""
    return sum(p == y for p, y in zip(predictions, labels, strict=True)) / len(labels)


def matthews(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """Matthews correlation of two or more classes (Gorodkin 2004); 0 when it is undefined."""
    classes = max(*predictions, *labels) + 1
    p = torch.nn.functional.one_hot(torch.tensor(predictions), classes).double()
    y = torch.nn.functional.one_hot(torch.tensor(labels), classes).double()
    p, y = p - p.mean(0), y - y.mean(0)
    spread = (p.square().sum() * y.square().sum()).sqrt()
    return ((p * y).sum() / spread).item() if spread > 0 else 0.0


def pearson(predictions: Sequence[float], labels: Sequence[float]) -> float:
    """Pearson correlation; 0 when either side is constant."""
    p, y = (torch.tensor(values, dtype=torch.float64) for values in (predictions, labels))
    p, y = p - p.mean(), y - y.mean()
    spread = p.norm() * y.norm()
    return (p @ y / spread).item() if spread > 0 else 0.0


# Four lines each, where scikit-learn and SciPy would be two more requirements.
CLASSIFICATION_METRICS = {"accuracy": accuracy, "matthews": matthews, "pearson": pearson}
