"""Table 2: do better teachers make better students, and better eyes of a VLM?

Five teachers of one ViT-T/16, two of three hierarchical students, CLIP-KD's loss as its code was
released; every student under TinyLLaVA with both language models. Hypothesis, the paper's: students
do not follow their teachers' own accuracy (SigLIP's is the best teacher and the worst taught), and
VLMs follow the students even less. `control_heads.py` asks how much of it the code explains.
"""

from kdscale import Distill, Pivot, Sweep, Vlm, choose

vit = Distill(
    student="vit_t16",
    teacher=choose("siglip_so400m", "clip_l14", "clip_b16", "dfn_l14", "dfn_b16"),
    loss="clip_kd",
    mode="paper",
)
hierarchical = Distill(
    student=choose("mobilevit_s", "swin_t", "convnext_t"),
    teacher=choose("dfn_l14", "dfn_b16"),
    loss="clip_kd",
    mode="paper",
)
vlms = [
    Vlm(
        vision=student.output,
        recipe="tinyllava",
        llm=choose("qwen2_0_5b", "smollm_360m"),
        suite="paper16",
    )
    for student in (vit, hierarchical)
]
sweep = Sweep(
    name="table2_teachers",
    stages=[vit, hierarchical, *vlms],
    table=Pivot(rows="teacher", columns="student"),
)
if __name__ == "__main__":
    sweep.main()
