"""Figure 2: does the gap between a student's VLM and its teacher's widen with the teacher?

The same VLM on each of five teachers, and on the ViT-T/16 that each has taught. Hypothesis: the gap
widens because the teachers' scores grow while the students' stay where they are, so it says nothing
of distillation that the students' scores alone do not say.
"""

from kdscale import Distill, Pivot, Sweep, Vlm, choose

teacher = choose("siglip_so400m", "clip_l14", "clip_b16", "dfn_l14", "dfn_b16")
distill = Distill(student="vit_t16", teacher=teacher, loss="clip_kd", mode="paper")
vlms = [
    Vlm(vision=eye, recipe="tinyllava", llm="qwen2_0_5b", suite="paper16")
    for eye in (teacher, distill.output)
]
sweep = Sweep(
    name="figure2_gap",
    stages=[distill, *vlms],
    table=Pivot(rows="teacher", columns="student"),
)
if __name__ == "__main__":
    sweep.main()
