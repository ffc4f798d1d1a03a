"""Do both VLM stages run at true dimensions on a laptop's memory?

A ViT-T tower and each language model of the study, all with random weights: one step of projector
pretraining and one of fine-tuning on drawn conversations, with TinyLLaVA's recipe at a global
batch of 2 in fp32, and the model saved. Nothing is learnt. Give it 24 GB.
"""

from kdscale import DataSpec, MiniWorld, Sweep, Vlm, choose

captions = DataSpec(
    name="drawn captions",
    mini=MiniWorld(content="pretrain", num_samples=8, samples_per_shard=8, seed=21),
)
conversations = DataSpec(
    name="drawn conversations",
    mini=MiniWorld(content="instruct", num_samples=8, samples_per_shard=8, seed=22),
)
vlm = Vlm(
    vision="vit_t16",
    llm=choose("qwen2_0_5b", "smollm_360m"),
    recipe="tinyllava",
    pretrain={"data": captions, "max_steps": 1},
    finetune={"data": conversations, "max_steps": 1},
)
sweep = Sweep(name="vlm_true_size", stages=[vlm], scale="true_size_cpu")
if __name__ == "__main__":
    sweep.main()
