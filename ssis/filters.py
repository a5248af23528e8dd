r"""Which predictions become pseudo-labels.

A wrong pseudo-label teaches the student a mistake that it then hands back to the
teacher; a missing one teaches that an object is background. The filter stands between.

Guided Distillation keeps an instance on its class score alone:

$$ keep_i = [ c_i > \tau_{class} ] \wedge [ area_i > 5 px ] $$       GD Eq. (filter)

with c the class probability and the area that of {p > 0.5}.

Read next: `ssis/losses.py`, where the student learns from what is kept.
"""

from torch import Tensor

from ssis.teacher import PseudoLabels


def keep(predictions: PseudoLabels, tau_class: float, min_area: int) -> PseudoLabels:
    """The predictions of one image that the student is trained on.

    Args:
        predictions: of the teacher.
        tau_class: class quality that must be passed, in [0, 1].
        min_area: mask area that must be passed, pixels.
    """
    # GD Eq. (filter)
    return predictions[
        (predictions.class_quality > tau_class) & (area(predictions) > min_area)
    ]


def area(predictions: PseudoLabels) -> Tensor:
    """Mask areas, (N,) int64, pixels."""
    return predictions.masks.flatten(1).sum(dim=1)
