"""Does the whole machine run on real photographs at true dimensions?

A ViT-B/16 teacher and a ViT-T/16 student with random weights, 224 px, ten steps: nothing is
learnt, everything is exercised. Shards are yours: `--data 'DIR/{00000..00007}.tar'`; each
sample's `.json` must carry its ImageNet `label`.
"""

from kdscale import DataSpec, Distill, Pivot, Sweep, ZeroShotSpec

photos = DataSpec(name="photos")
distill = Distill(
    student="vit_t16",
    teacher="clip_b16",
    loss="clip_kd",
    data=photos,
    zero_shot=ZeroShotSpec(name="photos", data=photos, templates="simple"),
    global_batch_size=64,
    epochs=2,
    max_steps=10,
    warmup_steps=2,
)
sweep = Sweep(
    name="photos",
    stages=[distill],
    table=Pivot(rows="teacher", columns="loss"),
    scale="true_size_cpu",
)
if __name__ == "__main__":
    sweep.main()
