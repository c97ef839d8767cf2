"""Thresholds per layer and head of particular models, as data, and the calibrator that fits them for any model.

    table = calibrate(model, prompts, "xattention", target=0.95)   # smallest thresholds that keep 95 % of the mass
    table.save("thresholds.json")
    model.config.sparseattn = ThresholdTable.load("thresholds.json").attention_options()

``available()`` lists the tables that ship with the package, ``find`` looks one up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparseattn.threshold.tables import ThresholdTable as ThresholdTable
from sparseattn.threshold.tables import available as available
from sparseattn.threshold.tables import check_shape as check_shape
from sparseattn.threshold.tables import find as find

if TYPE_CHECKING:
    from sparseattn.threshold.calibration import calibrate as calibrate


def __getattr__(name: str) -> Any:
    if name == "calibrate":  # needs Transformers, the tables do not
        from sparseattn.threshold.calibration import calibrate

        return calibrate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
