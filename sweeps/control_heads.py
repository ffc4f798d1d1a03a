"""Control: do wide teachers teach badly, or do the released projection heads?

CLIP-KD's code draws other heads on every GPU, never saves them, and divides feature distillation by
the teacher's width. Heads exist only where the widths differ: none for both B/16 (512, like the
student), 768 for both L/14, 1152 for SigLIP. So the B rows tell what the rest of the mode changes,
and the others less the B rows what the heads do. Hypothesis: `corrected` gains more the wider the
teacher, and the order of the teachers in Table 2 does not survive.
"""

from kdscale import Distill, Pivot, Sweep, Vlm, choose

distill = Distill(
    student="vit_t16",
    teacher=choose("clip_b16", "dfn_b16", "clip_l14", "dfn_l14", "siglip_so400m"),
    loss="clip_kd",
    mode=choose("paper", "corrected"),
)
vlm = Vlm(vision=distill.output, recipe="tinyllava", llm="qwen2_0_5b", suite="paper16")
sweep = Sweep(
    name="control_heads",
    stages=[distill, vlm],
    table=Pivot(rows="teacher", columns="mode"),
    baseline={"mode": "paper"},
)
if __name__ == "__main__":
    sweep.main()
