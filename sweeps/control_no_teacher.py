"""Control: what does distillation add at all?

The paper trains no student without a teacher, and nine of its fifteen single-loss rows lie below
what CLIP-KD reports for such a student on a little more data. Every student alone, and with DFN
ViT-B/16, the teacher with the best students. Hypothesis: each gains zero-shot accuracy, and the
VLM's average moves by less than its own interval.
"""

from kdscale import Distill, Pivot, Sweep, Vlm, choose

student = choose("vit_t16", "mobilevit_s", "swin_t", "convnext_t")
alone = Distill(student=student, teacher=None, loss="clip", mode="paper")
taught = Distill(student=student, teacher="dfn_b16", loss="clip_kd", mode="paper")
vlms = [
    Vlm(vision=eye.output, recipe="tinyllava", llm="qwen2_0_5b", suite="paper16")
    for eye in (alone, taught)
]
sweep = Sweep(
    name="control_no_teacher",
    stages=[alone, taught, *vlms],
    table=Pivot(rows="student", columns="teacher"),
    baseline={"teacher": None},
)
if __name__ == "__main__":
    sweep.main()
