"""Paints a scene of the miniature world: antialiased, textured, the same bytes everywhere."""

from __future__ import annotations

import math

import cv2
import numpy as np

from kdscale.mini.scenes import BACKGROUNDS, COLOURS, OUTLINES, Draws, Scene, Thing

SHIFT_BITS = 6
JPEG_QUALITY = 90


def encode_jpeg(scene: Scene, px: int) -> bytes:
    """Paints a scene and returns it as a JPEG."""
    bgr = cv2.cvtColor(render(scene, px), cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()


def render(scene: Scene, px: int) -> np.ndarray:
    """Paints a scene.

    Args:
        scene: What to show.
        px: Side of the image.

    Returns:
        RGB of shape (px, px, 3), uint8.
    """
    draws = Draws("texture", scene.texture)
    coarse = draws.octets(5 * 5 * 3).reshape(5, 5, 3) % np.uint8(33)
    canvas = np.empty((px, px, 3), dtype=np.uint8)
    canvas[:] = [max(0, level - 16) for level in BACKGROUNDS[scene.background]]
    cv2.add(canvas, cv2.resize(coarse, (px, px), interpolation=cv2.INTER_LINEAR_EXACT), canvas)
    if scene.word:
        _paint_sign(canvas, scene)
    for slot, (colour, height) in enumerate(scene.bars):
        _paint_bar(canvas, slot, len(scene.bars), height, COLOURS[colour])
    for thing in scene.things:
        _paint_thing(canvas, thing)
    grain = draws.octets(px * px * 3).reshape(px, px, 3) % np.uint8(scene.noise)
    cv2.add(canvas, grain, canvas)
    half = scene.noise // 2
    return cv2.subtract(canvas, (half, half, half, 0))  # pyright: ignore[reportCallIssue, reportArgumentType]


def _paint_thing(canvas: np.ndarray, thing: Thing) -> None:
    """Fills a shape's outline, antialiased."""
    side = canvas.shape[0] * 2**SHIFT_BITS
    cos, sin = math.cos(thing.angle) * thing.radius, math.sin(thing.angle) * thing.radius
    turn = np.array([[cos, sin], [-sin, cos]])
    contours = [
        np.rint((outline @ turn + (thing.x, thing.y)) * side).astype(np.int32)
        for outline in OUTLINES[thing.shape]
    ]
    cv2.fillPoly(canvas, contours, thing.rgb, cv2.LINE_AA, SHIFT_BITS)


def _paint_sign(canvas: np.ndarray, scene: Scene) -> None:
    """A panel across the image with a word on it, light on dark or dark on light."""
    assert scene.word is not None
    assert scene.panel is not None
    px, panel = canvas.shape[0], COLOURS[scene.panel]
    top, bottom = px // 4, px - px // 4
    cv2.rectangle(canvas, (px // 16, top), (px - 1 - px // 16, bottom), panel, cv2.FILLED)
    ink = (250, 250, 250) if sum(panel) < 380 else (16, 16, 16)
    scale, thick = px / 74, max(1, px // 32)
    (width, height), _ = cv2.getTextSize(scene.word, cv2.FONT_HERSHEY_SIMPLEX, scale, thick)
    corner = ((px - width) // 2, (px + height) // 2)
    cv2.putText(
        canvas, scene.word, corner, cv2.FONT_HERSHEY_SIMPLEX, scale, ink, thick, cv2.LINE_AA
    )


def _paint_bar(
    canvas: np.ndarray, slot: int, num_bars: int, height: float, rgb: tuple[int, int, int]
) -> None:
    """One bar of a chart, standing on the lower edge."""
    px = canvas.shape[0]
    step = px * 0.9 / num_bars
    left = round(px * 0.05 + slot * step + step * 0.12)
    right = round(px * 0.05 + (slot + 1) * step - step * 0.12)
    base = px - 1 - px // 20
    cv2.rectangle(canvas, (left, round(base - height * px)), (right, base), rgb, cv2.FILLED)
