"""Figure 3: does longer distillation help, or only the end of the learning rate's cosine?

The paper's curve over 32, 64 and 96 epochs fits one run of 96 that is read on the way: its value at
32 lies far below Table 2's. Both protocols: `early` reads one 96-epoch cosine at 32 and 64,
`complete` runs 32, 64 and 96 to their ends. In the table, rows are the epochs of a run and columns
where it is read, so row 96 is the paper's protocol and the diagonal the other one. Hypothesis: on
the diagonal the gain from 32 to 96 is a fraction of what row 96 shows. `kdscale report --paper`
draws both in one figure and judges whether it is smaller.
"""

from kdscale import Distill, Pivot, Sweep, Vlm, choose

teacher, length = choose("clip_l14", "dfn_l14"), choose(32, 64, 96)
common = {"student": "vit_t16", "teacher": teacher, "loss": "clip_kd", "mode": "paper"}
early = Distill(**common, epochs=96, read_epoch=choose(32, 64))
complete = Distill(**common, epochs=length, read_epoch=length)
vlms = [
    Vlm(vision=student, recipe="tinyllava", llm="qwen2_0_5b", suite="paper16")
    for student in (early, complete)
]
sweep = Sweep(
    name="figure3_duration",
    stages=[early, complete, *vlms],
    table=Pivot(rows="epochs", columns="read_epoch"),
)
if __name__ == "__main__":
    sweep.main()
