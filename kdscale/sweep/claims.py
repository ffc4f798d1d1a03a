"""The claims of arXiv 2511.17886, as comparisons of places in its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kdscale.sweep.paper_tables import (
    COMPLETE,
    EPOCHS,
    LONG_TEACHERS,
    LOSSES,
    ON_THE_WAY,
    PROTOCOLS,
    TITLES,
    encoder_rows,
    long_place,
)
from kdscale.sweep.places import AVERAGE, CKA, IMAGENET, RELEASED, Place, encoder, student
from kdscale.sweep.verdicts import Claim, Comparison

CLIP_B, CLIP_L, SIGLIP = "CLIP-ViT-B", "CLIP-ViT-L", "SigLIP-so400m"
DFN_B, DFN_L = "DFN-ViT-B", "DFN-ViT-L"
TEACHERS = (SIGLIP, CLIP_L, CLIP_B, DFN_L, DFN_B)
STUDENTS = ("ViT-T", "Mobile-ViT", "Swin-Tiny", "ConvNext-Tiny")
MORE_DATA = ("CC12M + Bunny Pretrain", "CC12M + TinyLLaVA Pretrain")
TABLE3 = ("cvbench_2d", "gqa", "scienceqa", "mmvp", IMAGENET)
SCORES = (AVERAGE, IMAGENET)
OWN_VLM = ("TinyLLaVA", "Qwen2-0.5B")  # whose average says which teacher is stronger: table 1
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


def _stronger(first: str, second: str) -> Comparison:
    """Says that a teacher is stronger: a VLM on it, as on the students, answers better."""
    one, other = (encoder(AVERAGE, *OWN_VLM, teacher) for teacher in (first, second))
    return _over(f"{first} is stronger than {second}", one, other)


def _though_weaker(first: str, *others: str) -> list[Comparison]:
    """Says that a teacher's student scores more than those of stronger teachers."""
    return [
        replace(c, premise=_stronger(other, first))
        for other in others
        for c in _teachers(AVERAGE, first, other)
    ]


def _smaller_encoders() -> tuple[Comparison, ...]:
    """Says that within a family the larger encoder sees more, for every framework and LM."""
    pairs = ((SIGLIP, CLIP_L), (CLIP_L, CLIP_B), (DFN_L, DFN_B), (CLIP_B, RELEASED))
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
    """Says that teacher minus student is larger for the stronger of two teachers."""
    return Comparison(
        name=f"gap of {large} over gap of {small}",
        terms=(
            (1.0, encoder(AVERAGE, *OWN_VLM, large)),
            (-1.0, student(AVERAGE, large)),
            (-1.0, encoder(AVERAGE, *OWN_VLM, small)),
            (1.0, student(AVERAGE, small)),
        ),
        premise=_stronger(large, small),
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
        for loss in LOSSES[1:]
    ]


def _more_alike(task: str) -> Comparison:
    """Says that CKA with the own teacher is higher for CLIP-ViT-B than for CLIP-ViT-L."""
    base, large = (student(CKA + task, teacher) for teacher in (CLIP_B, CLIP_L))
    return _over(f"CKA on {TITLES[task]}: {CLIP_B} over {CLIP_L}", base, large)


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


def _longer(teacher: str, protocol: str, metric: str, least: float = 0.0) -> Comparison:
    """Says that 96 epochs score more than 32; with `least`, that they score no more than that."""
    short, long = (long_place(metric, teacher, protocol, epochs) for epochs in (32, 96))
    if least == 0.0:
        return _over(f"{TITLES[metric]}, {teacher}: 96 over 32 epochs", long, short)
    name = f"{TITLES[metric]}, {teacher}: 96 epochs gain less than {-least:g}"
    return _over(name, short, long, least)


def _duration(protocol: str) -> tuple[Claim, ...]:
    """Returns what the paper says of longer distillation, for one of the two protocols."""
    name = protocol.replace(" ", "_")
    return (
        Claim(
            name=f"longer_training_imagenet_{name}",
            text=f"Longer distillation raises ImageNet: {protocol}",
            source="section 6.1, figure 3",
            comparisons=tuple(_longer(teacher, protocol, IMAGENET) for teacher in LONG_TEACHERS),
        ),
        Claim(
            name=f"longer_training_vlms_flat_{name}",
            text="Longer distillation does not raise the multimodal average by a point: "
            f"{protocol}",
            source="section 6.1, figure 3; the point is this project's",
            comparisons=tuple(
                _longer(teacher, protocol, AVERAGE, -A_POINT) for teacher in LONG_TEACHERS
            ),
        ),
    )


def _end_of_cosine(teacher: str) -> Comparison:
    """Says that 32 to 96 epochs gain more read on the way: what they share, 96, cancels out."""
    complete, early = (
        long_place(IMAGENET, teacher, protocol, EPOCHS[0]) for protocol in (COMPLETE, ON_THE_WAY)
    )
    name = f"ImageNet, {teacher}: 32 epochs {COMPLETE} over 32 {ON_THE_WAY}"
    return _over(name, complete, early)


CLIP_LABELS = Claim(
    name="clip_labels_as_printed",
    text="CLIP-ViT-B and CLIP-ViT-L are as labelled, not swapped: B's student is better on "
    "ImageNet with every loss",
    source="tables 2 and 4 against appendix 8.1; this project's question",
    comparisons=tuple(
        _over(
            f"{loss}: {CLIP_B} over {CLIP_L}",
            student(IMAGENET, CLIP_B, loss=loss),
            student(IMAGENET, CLIP_L, loss=loss),
        )
        for loss in LOSSES
    ),
    need="agree",
)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="stronger_teacher_worse_student",
        text="A stronger teacher can make a worse student (multimodal average)",
        source="title, abstract, section 5.1",
        comparisons=(
            *_though_weaker(CLIP_B, CLIP_L, SIGLIP),
            *_though_weaker(DFN_L, CLIP_L, SIGLIP),
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
        comparisons=tuple(
            replace(c, premise=_stronger(CLIP_L, CLIP_B)) for c in map(_more_alike, TABLE3)
        ),
    ),
    Claim(
        name="cka_goes_with_score",
        text="Where CKA is higher the score is higher: CLIP-ViT-B's student on the same tasks",
        source="table 3",
        comparisons=tuple(
            replace(c, name=f"{TITLES[task]}: {CLIP_B} over {CLIP_L}", premise=_more_alike(task))
            for task in TABLE3
            for c in _teachers(task, CLIP_B, CLIP_L)
        ),
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
    *(claim for protocol in PROTOCOLS for claim in _duration(protocol)),
    Claim(
        name="longer_gain_is_the_cosine",
        text="The gain from 32 to 96 epochs is smaller where each length is run to the end: a part "
        "of what one run shows on its way is the end of its cosine",
        source="figure 3's two protocols; this project's question",
        comparisons=tuple(_end_of_cosine(teacher) for teacher in LONG_TEACHERS),
    ),
    CLIP_LABELS,
)
