"""Table 1: what does a VLM lose when its vision encoder shrinks to five million parameters?

Two frameworks, two language models and six encoders: the study's teachers, and a ViT-T/16 that
CLIP ViT-B/16 has taught on CC12M. The paper takes that one from CLIP-KD's release, whose files were
trained on more data than its caption says, so it is distilled here; the released file would be
`Pretrained("ViT_T_16.pt", student="vit_t16")` in its place. Hypothesis: with Qwen2 the average
follows the size of the encoder within a family, and with SmolLM under TinyLLaVA, close to chance,
it follows nothing. Bunny's printed averages hold MME's accuracy where MMBench should stand.
"""

from kdscale import Distill, Pivot, Sweep, Vlm, choose

small = Distill(student="vit_t16", teacher="clip_b16", loss="clip_kd", mode="paper")
vlm = Vlm(
    vision=choose("siglip_so400m", "dfn_l14", "clip_l14", "dfn_b16", "clip_b16", small.output),
    recipe=choose("tinyllava", "bunny"),
    llm=choose("qwen2_0_5b", "smollm_360m"),
    suite="paper16",
)
sweep = Sweep(
    name="table1_encoders",
    stages=[small, vlm],
    table=Pivot(rows="teacher", columns="student"),
)
if __name__ == "__main__":
    sweep.main()
