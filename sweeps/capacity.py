"""Capacity: do stronger teachers pay once the student is larger?

ViT-T, -S and -B/16 beside the same text tower, alone and from three teachers of growing accuracy.
Hypothesis: the gap between the teachers is one of capacity, so their order turns round as the
student grows; if ViT-B still learns least from SigLIP, width and tokenizer are to blame instead.
"""

from kdscale import Distill, Pivot, Sweep, Vlm, choose

student = choose("vit_t16", "vit_s16", "vit_b16")
alone = Distill(student=student, teacher=None, loss="clip", mode="paper")
taught = Distill(
    student=student,
    teacher=choose("dfn_b16", "dfn_l14", "siglip_so400m"),
    loss="clip_kd",
    mode="paper",
)
vlm = Vlm(vision=taught.output, recipe="tinyllava", llm="qwen2_0_5b", suite="paper16")
sweep = Sweep(
    name="capacity",
    stages=[alone, taught, vlm],
    table=Pivot(rows="teacher", columns="student"),
    baseline={"teacher": None},
)
if __name__ == "__main__":
    sweep.main()
