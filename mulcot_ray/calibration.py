"""Temperature scaling: probabilities p become p^(1/T), made to sum to 1, so that 0.9 means right nine times of ten.

Guo et al. 2017, "On calibration of modern neural networks" (arXiv 1706.04599). T is fitted on validation posts when a model is trained, stands
in `calibration.json` of its folder, and is applied by bulk labeler and endpoint alike. No label changes by it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from mulcot_ray.errors import InputError

FILE = "calibration.json"
BOUNDS = (0.05, 20.0)  # of T; where validation is answered without an error, the best T is 0
TINY = 1e-12  # probabilities below it count as it: a log-likelihood needs a bottom

Probabilities = tuple[float, float, float]


def scaled(p: Probabilities, t: float) -> Probabilities:
    """p^(1/T), summing to 1."""
    if t == 1.0:
        return p
    z = [math.log(max(x, TINY)) / t for x in p]
    top = max(z)
    e = [math.exp(x - top) for x in z]
    a, b, c = (x / sum(e) for x in e)
    return a, b, c


def fit(probabilities: Sequence[Sequence[float]], gold: Sequence[int]) -> float:
    """T with the smallest mean negative log-likelihood, within BOUNDS.

    probabilities: posts × 3, in the order of LABELS; gold: an index each. All are held in memory, 32 bytes a post. NLL is convex in 1/T, so
    it has one minimum, which is sought over log T. Raises InputError when there is no post.
    """
    import numpy as np
    from scipy.optimize import minimize_scalar

    if not len(probabilities):
        raise InputError("no post with probabilities and gold to fit a temperature on")
    logs = np.log(np.maximum(np.asarray(probabilities, dtype=np.float64), TINY))
    rows = np.arange(len(logs))

    def nll(log_t: float) -> float:
        z = logs / math.exp(log_t)
        z -= z.max(1, keepdims=True)
        return float((np.log(np.exp(z).sum(1)) - z[rows, list(gold)]).mean())

    return float(math.exp(minimize_scalar(nll, bounds=np.log(BOUNDS), method="bounded", options={"xatol": 1e-6}).x))


def read(folder: str | Path) -> float:
    """The temperature that a model's folder states; 1 where it states none."""
    path = Path(folder) / FILE
    return float(json.loads(path.read_text())["temperature"]) if path.exists() else 1.0
