"""Does a student learn more from a teacher than from captions alone? The sweep of the notebooks.

A base-like CLIP teaches with the full CLIP-KD loss and with the similarity term alone, beside a
student without a teacher.
"""

import json
import os

from kdscale import Distill, Pivot, Sweep, choose

# What the notebooks share: where stages live, and fields set from outside ({"max_steps": 12}).
STORAGE = os.environ.get("KDSCALE_STORAGE", "runs")
SETTINGS = json.loads(os.environ.get("KDSCALE_SETTINGS", "{}"))

control = Distill(student="vit_t16", teacher=None, loss="clip")
taught = Distill(student="vit_t16", teacher="clip_b16", loss=choose("clip_kd", "kl"))
sweep = Sweep(
    name="first_look",
    stages=[control, taught],
    table=Pivot(rows="teacher", columns="loss"),
    baseline={"teacher": None},
    scale="mini",
)
if __name__ == "__main__":
    sweep.main()
