"""Does a better teacher make a better student, and what does a VLM see through it? In miniature.

A student without a teacher is the control; a base-like and a large-like CLIP teach it with the
full CLIP-KD loss and with the similarity term alone. One student then becomes the eye of a small
VLM. Hypothesis: distillation beats the control, the stronger teacher's lead is smaller than its
own accuracy suggests, and the VLM answers better with its image than without.
"""

from kdscale import Distill, Pivot, Sweep, Vlm, choose

control = Distill(student="vit_t16", teacher=None, loss="clip")
distill = Distill(
    student="vit_t16",
    teacher=choose("clip_b16", "clip_l14"),
    loss=choose("clip_kd", "kl"),
)
taught = Distill(student="vit_t16", teacher="clip_l14", loss="clip_kd")
vlm = Vlm(
    vision=taught.output,
    recipe="tinyllava",
    llm="qwen2_0_5b",
    finetune={"epochs": 2, "max_steps": None},  # longer than usual, to tell what lies where
    questions="scenes",
    suite="paper16",
    cka_with="clip_l14",
)
sweep = Sweep(
    name="quickstart",
    stages=[control, distill, vlm],
    table=Pivot(rows="teacher", columns="loss", value="zero_shot_top1"),
    baseline={"teacher": None},
    scale="mini",
)
if __name__ == "__main__":
    sweep.main()
