"""Table 5: do more captions, of the kind that VLMs are trained on, help a student?

DFN ViT-L/14 and ViT-B/16 teach a ViT-T/16 on CC12M, on CC12M and Bunny's two million, and on CC12M
and LLaVA's half million; epochs stay 32, so more data also are more steps. Hypothesis, the paper's:
ImageNet falls and VLMs hardly move. Two of its cells equal the MSE column of Table 4 to the digit
and may be copied. The mixes are made by `kdscale data mix`; say `--data cc12m_bunny=...`.
"""

from kdscale import Distill, Pivot, Sweep, Vlm, choose

distill = Distill(
    student="vit_t16",
    teacher=choose("dfn_l14", "dfn_b16"),
    data=choose("cc12m", "cc12m_bunny", "cc12m_llava"),
    loss="clip_kd",
    mode="paper",
)
vlm = Vlm(vision=distill.output, recipe="tinyllava", llm="qwen2_0_5b", suite="paper16")
sweep = Sweep(
    name="table5_data",
    stages=[distill, vlm],
    table=Pivot(rows="teacher", columns="data"),
)
if __name__ == "__main__":
    sweep.main()
