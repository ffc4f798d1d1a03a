"""Table 4: which loss survives a stronger teacher?

Five teachers of one ViT-T/16 by four losses, each the contrastive task loss and what is named: all
of CLIP-KD, feature distillation (mse), interactive contrast (icl), similarities (kl). Hypothesis:
kl, alone in needing no projection between the widths, loses least with the wide teachers; the paper
reads the table as CLIP-KD's loss being best everywhere, which its own SigLIP row contradicts.
"""

from kdscale import Distill, Pivot, Sweep, Vlm, choose

distill = Distill(
    student="vit_t16",
    teacher=choose("siglip_so400m", "clip_l14", "clip_b16", "dfn_l14", "dfn_b16"),
    loss=choose("clip_kd", "mse", "icl", "kl"),
    mode="paper",
)
vlm = Vlm(vision=distill.output, recipe="tinyllava", llm="qwen2_0_5b", suite="paper16")
sweep = Sweep(
    name="table4_losses",
    stages=[distill, vlm],
    table=Pivot(rows="teacher", columns="loss"),
    baseline={"loss": "clip_kd"},
)
if __name__ == "__main__":
    sweep.main()
