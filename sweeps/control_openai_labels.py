"""Control: which of the two openai teachers is the paper's "CLIP-ViT-L"?

Section 8.1 names clip-vit-base-patch16 as CLIP-ViT-L and clip-vit-large-patch14 as CLIP-ViT-B. If
the code did so too, the CLIP half of Tables 2 to 4 is upside down. Roles here go by architecture,
and the two readings are two ways to lay one table beside the printed one:

                         clip_kd    mse     icl     kl
    as printed  clip_b16  36.56    35.63   29.04   35.04
                clip_l14  34.55    34.51   28.59   33.91
    as swapped  clip_b16  34.55    34.51   28.59   33.91
                clip_l14  36.56    35.63   29.04   35.04

Hypothesis: B minus L has the same sign for all four losses, and that sign decides: above zero, the
names are a slip of the text; below zero, the "larger teacher" of the CLIP rows was the smaller one.
`kdscale report --paper` has both readings as its table `clip_labels`, and says which ours fit.
"""

from kdscale import Distill, Pivot, Sweep, Vlm, choose

openai = choose("clip_b16", "clip_l14")
distill = Distill(
    student="vit_t16",
    teacher=openai,
    loss=choose("clip_kd", "mse", "icl", "kl"),
    mode="paper",
)
vlms = [
    Vlm(vision=eye, recipe="tinyllava", llm="qwen2_0_5b", suite="paper16")
    for eye in (openai, distill.output)
]
sweep = Sweep(
    name="control_openai_labels",
    stages=[distill, *vlms],
    table=Pivot(rows="teacher", columns="loss"),
)
if __name__ == "__main__":
    sweep.main()
