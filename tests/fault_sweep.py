"""Every kind of stage, made small: what the fault matrix (`tests/faults`) disturbs.

A teacher's outputs are cached, a student is distilled from them and becomes the eye of a VLM, which
is trained in both stages and asked questions. Teacher and language model have random weights, so
that nothing has to be trained beforehand; every stage has steps and checkpoints enough to be
interrupted between two of them.
"""

from typing import Any

from kdscale import DataSpec, Distill, Execution, Sweep, Vlm
from kdscale.core.catalog_mini import MINI_LANGUAGE_MODELS, vit
from kdscale.core.config import MiniWorld, ZeroShotSpec
from kdscale.core.vlm_config import QuestionsSpec

PX = 32
RUN = Execution(
    num_workers=1,
    cpus_per_worker=1,
    threads_per_worker=1,
    cpus_per_data_task=0.5,
    checkpoint_every=4,
    log_every=1,
)


def drawn(name: str, num_samples: int, **fields: Any) -> DataSpec:
    """Returns a data set of four shards."""
    world = MiniWorld(
        num_samples=num_samples, samples_per_shard=num_samples // 4, image_px=PX, **fields
    )
    return DataSpec(name=name, mini=world, num_samples=num_samples, max_bad_fraction=0.0)


sizes: dict[str, Any] = {"px": PX, "patch": 8, "text_width": 32, "text_layers": 1}
student = vit("student", width=32, layers=2, embed_dim=32, **sizes)
teacher = vit("teacher", width=64, layers=3, embed_dim=48, **sizes)
words = MINI_LANGUAGE_MODELS["qwen2_0_5b"].llm
llm = words.replace(
    name="language model",
    config={**words.config, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    hidden=32,
)
held_out = drawn("held-out pairs", 64, split="eval", seed=4)
distill = Distill(
    student=student,
    teacher=teacher,
    loss="clip_kd",
    data=drawn("pairs", 256, seed=1, caption_noise=0.2),
    zero_shot=ZeroShotSpec(name="held out", data=held_out, classnames="mini", templates="mini"),
    epochs=96,
    global_batch_size=1024,
    views=2,
    teacher_outputs="cached",
    run=RUN,
)
asked = MiniWorld(split="eval", content="instruct", num_samples=32, image_px=PX, seed=5)
talks: dict[str, Any] = {"global_batch_size": 16, "micro_batch_size": 16, "epochs": 1}
vlm = Vlm(
    vision=distill.output,
    llm=llm,
    pretrain={"data": drawn("captions", 192, seed=2, content="pretrain"), **talks, "run": RUN},
    finetune={"data": drawn("talks", 256, seed=3, content="instruct"), **talks, "run": RUN},
    questions=QuestionsSpec(name="held-out questions", mini=asked, max_new_tokens=4),
)
sweep = Sweep(name="faults", stages=[vlm], scale="mini")
if __name__ == "__main__":
    sweep.main()
