"""Does a better teacher make a better student, and does it depend on the loss? In miniature.

A student without a teacher is the control; a base-like and a large-like CLIP teach it with the
full CLIP-KD loss and with the similarity term alone. Hypothesis: distillation beats the control,
and the stronger teacher's lead is smaller than its own accuracy suggests.
"""

from kdscale import Distill, Pivot, Sweep, choose

control = Distill(student="vit_t16", teacher=None, loss="clip")
distill = Distill(
    student="vit_t16",
    teacher=choose("clip_b16", "clip_l14"),
    loss=choose("clip_kd", "kl"),
)
sweep = Sweep(
    name="quickstart",
    stages=[control, distill],
    table=Pivot(rows="teacher", columns="loss", value="zero_shot_top1"),
    baseline={"teacher": None},
    scale="mini",
)
if __name__ == "__main__":
    sweep.main()
