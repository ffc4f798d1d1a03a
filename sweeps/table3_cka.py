"""Table 3: is a student less like a larger teacher, and does a VLM see less through it?

One ViT-T/16 from CLIP ViT-B/16 and one from ViT-L/14, each compared with its teacher by linear CKA
on every benchmark's images, biased and debiased: the biased one is larger where a teacher is wider,
whatever the student.
Hypothesis, the paper's: CKA and accuracy both fall from B to L. It shows four of the sixteen
benchmarks; over all of them, eleven fall and five rise.
"""

from kdscale import CkaSpec, Distill, Pivot, Sweep, Vlm, choose

teacher = choose("clip_b16", "clip_l14")
distill = Distill(
    student="vit_t16",
    teacher=teacher,
    loss="clip_kd",
    mode="paper",
)
vlm = Vlm(
    vision=distill.output,
    recipe="tinyllava",
    llm="qwen2_0_5b",
    suite="paper16",
    cka_with=teacher,
    cka=CkaSpec(layers="final"),
)
sweep = Sweep(
    name="table3_cka",
    stages=[distill, vlm],
    table=Pivot(rows="teacher", columns="student", value="cka_debiased"),
)
if __name__ == "__main__":
    sweep.main()
