"""Checkpoints: is the most accurate checkpoint of a teacher the best teacher?

One ViT-B/16 trained here for 96 epochs, read at 32, 64 and 96: of one architecture, width and data,
these teachers differ in accuracy alone. Hypothesis: the student gains less than half of what the
teacher gains from 32 to 96, and with the similarity term alone an earlier teacher, whose
similarities are softer, is as good.
"""

from kdscale import Distill, Pivot, Sweep, choose

teacher = Distill(student="vit_b16", teacher=None, loss="clip", epochs=96)
alone = Distill(student="vit_t16", teacher=None, loss="clip")
taught = Distill(
    student="vit_t16",
    teacher=choose(teacher.at_epoch(32), teacher.at_epoch(64), teacher.output),
    loss=choose("clip_kd", "kl"),
)
sweep = Sweep(
    name="checkpoints",
    stages=[alone, taught],
    table=Pivot(rows="teacher", columns="loss"),
    baseline={"teacher": None},
)
if __name__ == "__main__":
    sweep.main()
