"""The claims of arXiv 2511.17886, as comparisons of places in its tables."""

from __future__ import annotations

from collections.abc import Sequence

from kdscale.sweep.paper_tables import LONG_TEACHERS, TITLES, encoder_rows
from kdscale.sweep.places import AVERAGE, CKA, IMAGENET, Place, encoder, student
from kdscale.sweep.verdicts import Claim, Comparison

CLIP_B, CLIP_L, SIGLIP = "CLIP-ViT-B", "CLIP-ViT-L", "SigLIP-so400m"
DFN_B, DFN_L = "DFN-ViT-B", "DFN-ViT-L"
TEACHERS = (SIGLIP, CLIP_L, CLIP_B, DFN_L, DFN_B)
STUDENTS = ("ViT-T", "Mobile-ViT", "Swin-Tiny", "ConvNext-Tiny")
MORE_DATA = ("CC12M + Bunny Pretrain", "CC12M + TinyLLaVA Pretrain")
TABLE3 = ("cvbench_2d", "gqa", "scienceqa", "mmvp", IMAGENET)
SCORES = (AVERAGE, IMAGENET)
A_POINT = 1.0  # an average that rises by less is called unchanged


def _over(name: str, first: Place, second: Place, least: float = 0.0) -> Comparison:
    """Says that the first number is larger."""
    return Comparison(name=name, terms=((1.0, first), (-1.0, second)), least=least)


def _teachers(metric: str, first: str, *others: str, model: str = "ViT-T") -> list[Comparison]:
    """Says that one teacher's student scores more than others' students."""
    return [
        _over(
            f"{model}: {first} over {other}",
            student(metric, first, model=model),
            student(metric, other, model=model),
        )
        for other in others
    ]


def _smaller_encoders() -> tuple[Comparison, ...]:
    """Says that within a family the larger encoder sees more, for every framework and LM."""
    pairs = ((SIGLIP, CLIP_L), (CLIP_L, CLIP_B), (DFN_L, DFN_B), (CLIP_B, "CLIP-KD-ViT-T"))
    blocks = dict.fromkeys((row.framework, row.llm) for row in encoder_rows())
    return tuple(
        _over(
            f"{framework}, {llm}: {large} over {small}",
            encoder(AVERAGE, framework, llm, large),
            encoder(AVERAGE, framework, llm, small),
        )
        for framework, llm in blocks
        for large, small in pairs
    )


def _wider_gap(large: str, small: str) -> Comparison:
    """Says that teacher minus student is larger for one teacher than for another."""
    own = ("TinyLLaVA", "Qwen2-0.5B")
    return Comparison(
        name=f"gap of {large} over gap of {small}",
        terms=(
            (1.0, encoder(AVERAGE, *own, large)),
            (-1.0, student(AVERAGE, large)),
            (-1.0, encoder(AVERAGE, *own, small)),
            (1.0, student(AVERAGE, small)),
        ),
    )


def _losses(metric: str) -> list[Comparison]:
    """Says that CLIP-KD's loss is better than any other, for every teacher."""
    return [
        _over(
            f"{TITLES[metric]}, {teacher}: CLIP-KD over {loss}",
            student(metric, teacher),
            student(metric, teacher, loss=loss),
        )
        for teacher in TEACHERS
        for loss in ("MSE", "ICL", "KL")
    ]


def _data(metric: str, teachers: Sequence[str], sign: int) -> list[Comparison]:
    """Says that more data lower a score (`sign` -1) or raise it (+1)."""
    found: list[Comparison] = []
    for teacher in teachers:
        for data in MORE_DATA:
            less = student(metric, teacher)
            more = student(metric, teacher, how=(data, 32))
            pair = (more, less) if sign > 0 else (less, more)
            words = (data, "CC12M") if sign > 0 else ("CC12M", data)
            found.append(_over(f"{TITLES[metric]}, {teacher}: {words[0]} over {words[1]}", *pair))
    return found


def _mobile(teacher: str) -> list[Comparison]:
    """Says that MobileViT beats ViT-T on ImageNet and loses as the eye of a VLM."""
    small, mobile = (
        {metric: student(metric, teacher, model=model) for metric in SCORES}
        for model in ("ViT-T", "Mobile-ViT")
    )
    return [
        _over(f"ImageNet, {teacher}: Mobile-ViT over ViT-T", mobile[IMAGENET], small[IMAGENET]),
        _over(f"Average, {teacher}: ViT-T over Mobile-ViT", small[AVERAGE], mobile[AVERAGE]),
    ]


def _longer(teacher: str, metric: str, least: float) -> Comparison:
    """Says that 96 epochs score more than 32; with `least`, that they score no more than that."""
    short, long = (student(metric, teacher, how=("CC12M", epochs)) for epochs in (32, 96))
    if least == 0.0:
        return _over(f"{TITLES[metric]}, {teacher}: 96 over 32 epochs", long, short)
    name = f"{TITLES[metric]}, {teacher}: 96 epochs gain less than {-least:g}"
    return _over(name, short, long, least)


CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="stronger_teacher_worse_student",
        text="A stronger teacher can make a worse student (multimodal average)",
        source="title, abstract, section 5.1",
        comparisons=(
            *_teachers(AVERAGE, CLIP_B, CLIP_L, SIGLIP),
            *_teachers(AVERAGE, DFN_L, CLIP_L, SIGLIP),
        ),
        need="any",
    ),
    Claim(
        name="clip_b_teaches_vlms_best",
        text="CLIP-ViT-B teaches VLMs' eyes better than CLIP-ViT-L and SigLIP",
        source="section 5.1, table 2",
        comparisons=tuple(_teachers(AVERAGE, CLIP_B, CLIP_L, SIGLIP)),
    ),
    Claim(
        name="clip_b_teaches_imagenet_best",
        text="CLIP-ViT-B's student is better on ImageNet than CLIP-ViT-L's and SigLIP's",
        source="section 5.1, table 2",
        comparisons=tuple(_teachers(IMAGENET, CLIP_B, CLIP_L, SIGLIP)),
    ),
    Claim(
        name="dfn_b_teaches_imagenet_best",
        text="DFN-ViT-B's students are better on ImageNet than DFN-ViT-L's",
        source="table 2",
        comparisons=tuple(c for m in STUDENTS for c in _teachers(IMAGENET, DFN_B, DFN_L, model=m)),
    ),
    Claim(
        name="dfn_l_teaches_vlms_best",
        text="DFN-ViT-L teaches VLMs' eyes better than DFN-ViT-B",
        source="table 2, where ViT-T and MobileViT show it and Swin and ConvNeXt do not",
        comparisons=tuple(c for m in STUDENTS for c in _teachers(AVERAGE, DFN_L, DFN_B, model=m)),
    ),
    Claim(
        name="smaller_encoder_lower_score",
        text="A VLM on a smaller encoder scores less",
        source="section 4, table 1",
        comparisons=_smaller_encoders(),
    ),
    Claim(
        name="gap_widens",
        text="The gap between teacher and student widens with the teacher",
        source="section 5.1, figure 2",
        comparisons=(_wider_gap(CLIP_L, CLIP_B), _wider_gap(SIGLIP, CLIP_L)),
    ),
    Claim(
        name="cka_higher_with_weaker_teacher",
        text="A student is more like the weaker teacher: CKA is higher with CLIP-ViT-B",
        source="table 3",
        comparisons=tuple(c for task in TABLE3 for c in _teachers(CKA + task, CLIP_B, CLIP_L)),
    ),
    Claim(
        name="cka_goes_with_score",
        text="Where CKA is higher the score is higher: CLIP-ViT-B's student on the same tasks",
        source="table 3",
        comparisons=tuple(c for task in TABLE3 for c in _teachers(task, CLIP_B, CLIP_L)),
    ),
    Claim(
        name="clip_kd_is_best_loss",
        text="CLIP-KD's loss is the best for every teacher",
        source="section 6.2, table 4",
        comparisons=(*_losses(AVERAGE), *_losses(IMAGENET)),
    ),
    Claim(
        name="kl_prefers_large_dfn",
        text="With KL alone the larger DFN teaches ImageNet better",
        source="table 4, not in the text",
        comparisons=(
            _over(
                f"{DFN_L} over {DFN_B}",
                student(IMAGENET, DFN_L, loss="KL"),
                student(IMAGENET, DFN_B, loss="KL"),
            ),
        ),
    ),
    Claim(
        name="more_data_lower_imagenet",
        text="More data do not help ImageNet: accuracy falls",
        source="section 6.3, table 5",
        comparisons=tuple(_data(IMAGENET, (DFN_L, DFN_B), -1)),
    ),
    Claim(
        name="more_data_helps_base_alone",
        text="More data raise the multimodal average with DFN-ViT-B and lower it with DFN-ViT-L",
        source="section 6.3, table 5",
        comparisons=(*_data(AVERAGE, (DFN_B,), 1), *_data(AVERAGE, (DFN_L,), -1)),
    ),
    Claim(
        name="imagenet_is_not_vqa",
        text="ImageNet does not carry over: MobileViT beats ViT-T there and loses on VLM tasks",
        source="table 2",
        comparisons=(*_mobile(DFN_L), *_mobile(DFN_B)),
    ),
    Claim(
        name="longer_training_imagenet",
        text="Longer distillation raises ImageNet",
        source="section 6.1, figure 3",
        comparisons=tuple(_longer(teacher, IMAGENET, 0.0) for teacher in LONG_TEACHERS),
    ),
    Claim(
        name="longer_training_vlms_flat",
        text="Longer distillation does not raise the multimodal average by a point",
        source="section 6.1, figure 3; the point is this project's",
        comparisons=tuple(_longer(teacher, AVERAGE, -A_POINT) for teacher in LONG_TEACHERS),
    ),
)
