"""Which weights of CLIP-KD's terms suit a strong teacher, and how much do they matter?

CLIP-KD tuned its weights with weak teachers on one student. Random search draws weights of feature
distance, interactive contrast and similarity together with the learning rate; ASHA gives up the
worse half after an eighth, a quarter and a half of the steps, by zero-shot top-1. Hypothesis: the
feature term's weight can vary tenfold around the published one without leaving its interval, while
the learning rate cannot; then the terms, not their weights, deserve the compute.

`metric="cka_debiased"` asks instead which weights make the student arrange images as its teacher
does. The feature term sums over the width here: 2000 / 512 is the published weight.
"""

from ray import tune
from ray.tune.schedulers import ASHAScheduler

from kdscale import Distill, Pivot, Search, Sweep

distill = Distill(
    student="vit_t16",
    teacher="clip_l14",
    loss={"task": 1.0, "fd": 2000 / 512, "icl": 1.0, "ckd": 1.0},
)
search = Search(
    space={
        "loss.fd": tune.loguniform(0.1, 100),
        "loss.icl": tune.uniform(0, 2),
        "loss.ckd": tune.uniform(0, 2),
        "lr": tune.loguniform(1e-4, 2e-3),
    },
    metric="zero_shot_top1",
    mode="max",
    num_trials=12,
    seed=0,
    scheduler=ASHAScheduler(time_attr="progress", max_t=100, grace_period=12, reduction_factor=2),
)
sweep = Sweep(
    name="loss_weights",
    stages=[distill],
    search=search,
    table=Pivot(rows="student", columns="teacher", value="zero_shot_top1"),
)
if __name__ == "__main__":
    sweep.main()
