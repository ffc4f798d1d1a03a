"""The smallest sweep there is, for a cluster to run: one student without a teacher."""

from kdscale import Distill, Pivot, Sweep

distill = Distill(student="vit_t16", teacher=None, loss="clip", max_steps=2)
sweep = Sweep(
    name="smallest",
    stages=[distill],
    table=Pivot(rows="student", columns="loss"),
    scale="mini",
)
if __name__ == "__main__":
    sweep.main()
