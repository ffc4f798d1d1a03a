"""`kdscale zero-shot`: a CLIP pair on ImageNet and its variants, Flickr30k and COCO."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import fsspec
import typer
from rich.table import Table

from kdscale.core.catalog_zero_shot import SUITE, published_top1
from kdscale.core.config import DataSpec, TowerSpec
from kdscale.core.storage import Storage
from kdscale.core.types import ConfigError, unknown_name
from kdscale.core.zero_shot_config import ZeroShot, ZeroShotSet
from kdscale.terminal import AsJson, StorageRoot, console, guarded, progress_bar

if TYPE_CHECKING:
    from kdscale.stages.evaluate import Tower
    from kdscale.stages.zeroshot import ZeroShotResult


class PrecisionName(StrEnum):
    """What forward passes compute in."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class CaptionChoice(StrEnum):
    """Which captions of an image take part in retrieval."""

    FIRST = "first"
    ALL = "all"


class TemplateChoice(StrEnum):
    """Prompts of a class."""

    OPENAI = "openai"
    SIMPLE = "simple"


class NumberingChoice(StrEnum):
    """What integer labels count."""

    OWN = "own"
    IMAGENET = "imagenet"


Model = Annotated[
    str,
    typer.Argument(
        help="Role (clip_b16), ARCH/TAG or ARCH/DIR of open_clip, directory, hub id, stage key."
    ),
]
Data = Annotated[
    list[str],
    typer.Option("--data", help="DIR that holds a folder per benchmark, or NAME=PATTERN."),
]
Benchmarks = Annotated[str, typer.Option("--benchmarks", help=f"Of {', '.join(SUITE)}.")]
InPrecision = Annotated[PrecisionName, typer.Option("--precision", help="fp16 needs a GPU.")]
WhichCaptions = Annotated[
    CaptionChoice, typer.Option("--captions", help="first: CLIP-KD's protocol.")
]
Prompts = Annotated[TemplateChoice, typer.Option("--templates", help="80 prompts a class, or 1.")]
Numbered = Annotated[
    NumberingChoice,
    typer.Option("--numbering", help="Integer labels of ImageNet-R and -A: of 200 or of 1,000."),
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="First images only.")]
MaxBad = Annotated[
    float, typer.Option("--max-bad", min=0, max=1, help="Share of unreadable images allowed.")
]
Gate = Annotated[
    bool, typer.Option("--gate", help="Fail unless each top-1 is the published one +- 0.1.")
]
Published = Annotated[
    float | None,
    typer.Option("--published", min=0, max=100, help="Top-1 in % that --gate holds the set to."),
]


def zero_shot(
    model: Model,
    data: Data,
    benchmarks: Benchmarks = "imagenet",
    precision: InPrecision = PrecisionName.FP32,
    captions: WhichCaptions = CaptionChoice.ALL,
    templates: Prompts = TemplateChoice.OPENAI,
    numbering: Numbered = NumberingChoice.OWN,
    limit: Limit = None,
    max_bad: MaxBad = 0.0,
    require_published: Gate = False,
    published: Published = None,
    storage: StorageRoot = "runs",
    as_json: AsJson = False,
) -> None:
    """Score a CLIP pair zero-shot, with 95 % intervals, chance and the published top-1."""
    with guarded():
        names = parse_benchmarks(benchmarks)
        places = parse_places(data, names)
        _check_options(published, names, precision)
        from kdscale.models.named import resolve_clip

        spec = resolve_clip(model, Storage(storage))
        recipes = {
            name: ZeroShot(
                tower=spec,
                images=SUITE[name],
                data=DataSpec(name=name, urls=places[name], max_bad_fraction=max_bad),
                templates=templates.value,
                numbering=numbering.value,
                captions=captions.value,
                precision=precision.value,
                limit=_cutting(limit, SUITE[name]),
                published=published_top1(spec, name) if published is None else published,
            )
            for name in names
        }
        if require_published:
            _check_gates(recipes)
        _run(recipes, _loaded(spec, Storage(storage)), require_published, as_json)


def parse_benchmarks(text: str) -> list[str]:
    """Returns the benchmarks of a list with commas, each once, in order.

    Raises:
        UnknownName: One that the suite does not have.
        ConfigError: None at all.
    """
    names = list(dict.fromkeys(filter(None, (name.strip() for name in text.split(",")))))
    for name in names:
        if name not in SUITE:
            raise unknown_name("zero-shot benchmark", name, SUITE)
    if not names:
        raise ConfigError(f"--benchmarks names none; it takes some of {', '.join(SUITE)}")
    return names


def _check_options(published: float | None, names: Sequence[str], precision: PrecisionName) -> None:
    """Refuses a published value that is not of one set of classes, and fp16 on a CPU."""
    from kdscale.stages.by_shard import device_for
    from kdscale.stages.loop import check_precision

    check_precision(precision.value, device_for(None).type)
    tasks = [SUITE[name].task for name in names]
    if published is not None and tasks != ["classes"]:
        raise ConfigError(
            f"--published is the top-1 of one set of classes, not of {', '.join(names)}; name that "
            "set alone in --benchmarks"
        )


def _cutting(limit: int | None, images: ZeroShotSet) -> int | None:
    """Returns a limit; one that leaves no image of a set out is none."""
    whole = images.num_images
    return None if limit is None or (whole is not None and limit >= whole) else limit


def _check_gates(recipes: dict[str, ZeroShot]) -> None:
    """Refuses gates that cannot be decided, before any model is loaded.

    Raises:
        ConfigError: No published value.
        GateUndecided: A limit, or a set that is not whole.
    """
    from kdscale.data.evalsets import num_items
    from kdscale.stages.gate import GateUndecided
    from kdscale.stages.zeroshot import labels_for, shards_for

    for name, recipe in recipes.items():
        whole = recipe.images.num_images
        if recipe.published is None:
            raise ConfigError(
                f"no top-1 of {recipe.tower.name} on {name} is on record: say --published X, or "
                "leave --gate or the set out"
            )
        if recipe.limit is not None:
            raise GateUndecided(
                f"--gate needs all {whole:,} images of {name}, and --limit takes {recipe.limit:,}"
            )
        found = sum(num_items(shard, labels_for(recipe)) for shard in shards_for(recipe))
        if whole not in (None, found):
            raise GateUndecided(
                f"{recipe.data.urls} holds {found:,} of the {whole:,} images of {name}: --gate "
                "needs them all"
            )


def parse_places(data: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Returns where each benchmark's images are.

    Args:
        data: `NAME=PATTERN`, or `DIR`, which holds a folder of the benchmark's name; with one
            benchmark `DIR` may be that folder, a pattern or a file.
        names: The benchmarks.

    Raises:
        ConfigError: A benchmark without a place, or a name that is none of them.
    """
    own: dict[str, str] = {}
    common: list[str] = []
    for item in data:
        name, found, pattern = item.partition("=")
        if not found or {"/", ":"} & set(name):
            common.append(item)
        elif name not in names:
            raise ConfigError(f"--data {item}: {name!r} is none of {', '.join(names)}")
        else:
            own[name] = pattern
    for name in names:
        if name in own:
            continue
        inside = [f"{root.rstrip('/')}/{name}" for root in common]
        hits = [path for path in inside if _is_folder(path)]
        hits = hits or (list(common) if len(names) == 1 else [])
        if len(hits) != 1:
            looked = ", ".join(inside) or "nothing"
            raise ConfigError(
                f"where is {name}? Looked at {looked} and found {len(hits)}; use --data {name}=DIR"
            )
        own[name] = hits[0]
    return own


def _is_folder(path: str) -> bool:
    """Tells whether a folder is there; a pattern is none."""
    if any(sign in path for sign in "*?[{"):
        return False
    fs, plain = fsspec.core.url_to_fs(path)
    return bool(fs.isdir(plain))


def _loaded(spec: TowerSpec, storage: Storage) -> Tower:
    """Builds a tower on the device that computes."""
    from kdscale.models.towers import load_tower
    from kdscale.stages.by_shard import device_for
    from kdscale.stages.evaluate import Tower

    return Tower(load_tower(spec, storage).eval().to(device_for(None)), spec)


def _run(
    recipes: dict[str, ZeroShot], tower: Tower, require_published: bool, as_json: bool
) -> None:
    """Evaluates, prints, and holds the scores against the published ones where asked to."""
    from kdscale.stages.gate import gate
    from kdscale.stages.zeroshot import ClassVectors, evaluate

    results: dict[str, ZeroShotResult] = {}
    vectors = ClassVectors(tower, next(iter(recipes.values())).precision)
    with progress_bar(as_json) as show:
        for name, recipe in recipes.items():
            results[name] = evaluate(
                recipe, tower, vectors, lambda done, of, name=name: show(name, done, of)
            )
    if as_json:
        print(json.dumps(_document(recipes, results), indent=2))
    else:
        console.print(_table(recipes, results))
        for line in _remarks(recipes, results):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    for name in recipes if require_published else ():
        gate(recipes[name], results[name])


def _document(recipes: dict[str, ZeroShot], results: dict[str, ZeroShotResult]) -> dict[str, Any]:
    """The scores for machines."""
    spec = next(iter(recipes.values())).tower
    found: dict[str, Any] = {}
    for name, result in results.items():
        fields = asdict(result)
        del fields["items"]
        found[name] = fields | {"published_top1": recipes[name].published}
    return {"model": spec.name, "weights": spec.weights, "benchmarks": found}


def _table(recipes: dict[str, ZeroShot], results: dict[str, ZeroShotResult]) -> Table:
    """The scores for people."""
    spec = next(iter(recipes.values())).tower
    table = Table(
        "set",
        "metric",
        "%",
        "95 % interval",
        "chance",
        "published",
        title=f"Zero-shot, {spec.name}",
    )
    for name, result in results.items():
        for metric, found in result.metrics.items():
            expected = recipes[name].published if metric == "top1" else None
            table.add_row(
                name,
                metric.replace("_", " "),
                f"{found.value:.2f}",
                f"{found.interval.low:.2f} to {found.interval.high:.2f}",
                f"{found.chance:.2f}",
                "" if expected is None else f"{expected:.2f}",
            )
    return table


def _remarks(recipes: dict[str, ZeroShot], results: dict[str, ZeroShotResult]) -> list[str]:
    """What must be known of the scores."""
    lines: list[str] = []
    for name, result in results.items():
        notes = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in result.notes.items())
        whole = "" if result.complete else f" of {recipes[name].images.num_images}: not the set"
        bad = "".join(f"; {count} {cause}" for cause, count in result.unreadable.items())
        lines.append(f"{name}: {result.n:,} images{whole}; {notes}{bad}")
    if next(iter(recipes.values())).tower.weights == "random":
        lines.append("the weights are random: these scores are chance")
    return lines
