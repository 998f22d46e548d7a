"""Which evaluation on validation is the best, and when no better one is awaited."""


def gained(curve: list[dict], metric: str) -> bool:
    """Whether the last row of a learning curve is better than every one before.

    Args:
      curve: rows of split -> scores, the last one with the split val.
      metric: of config.train.select_metric; a score that is NaN is never better.
    """
    *earlier, last = of_validation(curve, metric)
    return last > max((v for v in earlier if v == v), default=-1.0)


def stale(curve: list[dict], metric: str) -> int:
    """Evaluations on validation since the best one."""
    values = [v if v == v else -1.0 for v in of_validation(curve, metric)]
    return len(values) - 1 - values.index(max(values)) if values else 0


def stopped(config, curve: list[dict]) -> bool:
    """Whether config.train.patience is exhausted."""
    patience = config.train.patience
    return patience > 0 and stale(curve, config.train.select_metric) >= patience


def of_validation(curve: list[dict], metric: str) -> list[float]:
    return [row["val"][metric] for row in curve if "val" in row]
