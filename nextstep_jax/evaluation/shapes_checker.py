"""Reads pictures of the built-in world from their pixels alone and answers GenEval's questions.

GenEval (arXiv 2310.11513) runs an object detector on a generated picture and checks the caption's
claim against what it found. In the built-in world the detector can be exact: the ground is fitted
by a plane, what differs from it is cut into connected pieces, and each piece is compared with
templates of every shape. The checker knows the palette and the shapes' outlines, never the scene.

Units as in `data/shapes_scene.py`: coordinates, radii and areas are shares of the picture.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from scipy import ndimage

from nextstep_jax.data.shapes_scene import PALETTE, SHAPES, signed_distance

UNKNOWN = "unknown"  # The shape or colour of a piece that resembles nothing of the world.

_NAMES = tuple(PALETTE)
_COLORS = np.array([PALETTE[name] for name in _NAMES], np.float32)
# All limits below are ours.
_FOREGROUND = 36.0  # RGB distance from the ground beyond which a pixel may belong to an object.
_MIN_AREA = 0.006  # Share of the picture; a third of the smallest object's.
_MIN_SECOND = 0.2  # Share of a piece in a second colour from which it counts as two objects.
_MAX_COLOR_DISTANCE = 75.0  # From the palette's colour; about half of the least distance in it.
_MIN_LIKENESS = 0.8  # Correlation with the best template.
_GRID = 24  # Side of a template, in samples.
_TEMPLATE_ANGLES = (-12.0, -6.0, 0.0, 6.0, 12.0)
# Blur, in roots of the area: a crisp edge, and what JPEG or a tokenizer does to a small star.
_TEMPLATE_BLURS = (0.04, 0.1)
_POSITION_THRESHOLD = 0.1  # GenEval's: share of the boxes' sizes that an offset must exceed.


@dataclasses.dataclass(frozen=True)
class DetectedObject:
    """One object read from a picture.

    Attributes:
        shape: A shape's name, or "unknown".
        color: A colour's name, or "unknown".
        x: Centroid, from the left.
        y: Centroid, from the top.
        radius: Of the circle around the shape.
        area: Share of the picture that the object covers.
        likeness: Correlation with the best template, at most 1.
    """

    shape: str
    color: str
    x: float
    y: float
    radius: float
    area: float
    likeness: float


# Reading a picture


@functools.cache
def _grid_basis(height: int, width: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """(1, x, y) about the middle at every `stride`-th pixel, and which lie at the border."""
    ys, xs = np.mgrid[0:height:stride, 0:width:stride].astype(np.float32)
    basis = np.stack([np.ones_like(xs), xs / width - 0.5, ys / height - 0.5], -1).reshape(-1, 3)
    return basis, (np.abs(basis[:, 1:]) > 0.5 - 2.5 * stride / min(height, width)).any(1)


def fit_background(
    image: Float[np.ndarray, "height width 3"],
) -> Float[np.ndarray, "height width 3"]:
    """The picture's ground: a plane in each channel, fitted robustly from the border inwards."""
    height, width, _ = image.shape
    stride = max(1, min(height, width) // 32)
    basis, border = _grid_basis(height, width, stride)
    samples = image[::stride, ::stride].reshape(-1, 3)
    guess = np.median(samples[border], axis=0)
    # Objects may touch the border of a generated picture, so each fit keeps what is near the last
    # one; the last fit, over the whole picture, evens out the noise.
    for limit, region in ((75.0, border), (40.0, border), (30.0, True), (30.0, True)):
        keep = region & (((samples - guess) ** 2).sum(1) < limit**2)
        if keep.sum() < 16:
            break
        chosen = basis[keep]
        # The small ridge keeps the solution tame where the kept pixels lie on one line.
        gram = chosen.T @ chosen + 1e-3 * np.eye(3, dtype=np.float32)
        plane = np.linalg.solve(gram, chosen.T @ samples[keep])
        guess = basis @ plane
    else:
        rows = (np.arange(height, dtype=np.float32) / height - 0.5)[:, None, None] * plane[2]
        cols = (np.arange(width, dtype=np.float32) / width - 0.5)[:, None] * plane[1]
        return plane[0] + rows + cols
    return np.broadcast_to(np.median(samples[border], axis=0), image.shape).astype(np.float32)


def explain_pixels(
    pixels: Float[np.ndarray, "n 3"], ground: Float[np.ndarray, "n 3"]
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The palette colour that best explains each pixel as a blend with the ground, and its share.

    An anti-aliased pixel lies on the line from the ground to its object's colour, which tells a red
    edge on white from pink where the nearest colour would not.

    Returns:
        Indices into the palette (n,), and the colour's share of the pixel in [0, 1].
    """
    offset = pixels - ground
    reach = _COLORS[:, None] - ground
    dots = np.einsum("nk,cnk->cn", offset, reach)
    norms = np.einsum("cnk,cnk->cn", reach, reach)
    shares = np.clip(dots / norms, 0, 1)
    residual = shares * (shares * norms - 2 * dots)  # Squared distance, less |offset|^2.
    best = residual.argmin(0)
    return best, shares[best, np.arange(best.size)]


def read_scene(image: UInt8[np.ndarray, "height width 3"]) -> list[DetectedObject]:
    """Every object of a picture, in reading order, from its pixels alone."""
    pixels = image.astype(np.float32)
    ground = fit_background(pixels)
    different = ((pixels - ground) ** 2).sum(-1) > _FOREGROUND**2
    best = np.zeros(different.shape, np.int64)
    covered = np.zeros(different.shape, bool)
    colors, shares = explain_pixels(pixels[different], ground[different])
    best[different] = colors
    covered[different] = shares > 0.5
    pieces, number = ndimage.label(covered)
    min_pixels = _MIN_AREA * different.size
    found = []
    for index, box in enumerate(ndimage.find_objects(pieces), 1):
        piece = pieces[box] == index
        if piece.sum() < min_pixels:
            continue
        masks = _split_by_color(piece, best[box], min_pixels)
        # The parts of a cut piece get labels of their own before any of them is described.
        labels = [index] if len(masks) == 1 else range(number + 1, number + 1 + len(masks))
        number += len(masks)
        for mask, label in zip(masks, labels, strict=True):
            pieces[box][mask] = label
        # Two more pixels on every side hold the faint rim of the edge.
        wide = tuple(slice(max(0, side.start - 2), side.stop + 2) for side in box)
        found += [_describe(pixels, ground, pieces, wide, label) for label in labels]
    return sorted(found, key=lambda item: (item.y, item.x))


def _erode(mask: np.ndarray) -> np.ndarray:
    """The pixels whose four neighbours are in the mask too; outside of the array nothing is."""
    inner = np.zeros_like(mask)
    inner[1:-1, 1:-1] = (
        mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    )
    return inner


def _dilate(mask: np.ndarray) -> np.ndarray:
    """The pixels within two steps of the mask."""
    for _ in range(2):
        wider = mask.copy()
        wider[1:] |= mask[:-1]
        wider[:-1] |= mask[1:]
        wider[:, 1:] |= mask[:, :-1]
        wider[:, :-1] |= mask[:, 1:]
        mask = wider
    return mask


def _split_by_color(piece: np.ndarray, best: np.ndarray, min_pixels: float) -> list[np.ndarray]:
    """Cuts a connected piece where it has two or more colours; [piece] itself where it has one."""
    core = _erode(piece)
    votes = np.bincount(best[core if core.any() else piece], minlength=len(_NAMES))
    strong = np.flatnonzero(votes >= _MIN_SECOND * votes.sum())
    if len(strong) < 2:
        return [piece]
    masks = []
    for color in strong:
        parts, number = ndimage.label(piece & (best == color))
        sizes = np.bincount(parts.ravel(), minlength=number + 1)
        masks += [parts == i for i in range(1, number + 1) if sizes[i] >= min_pixels]
    return masks if len(masks) > 1 else [piece]


def _describe(
    pixels: np.ndarray,
    ground: np.ndarray,
    pieces: np.ndarray,
    box: tuple[slice, slice],
    label: int,
) -> DetectedObject:
    """Colour, place and shape of one piece, inside a box that is a little larger."""
    height, width = pieces.shape
    mine = pieces[box] == label
    core = _erode(_erode(mine))
    color = np.median(pixels[box][core if core.sum() >= 5 else mine], axis=0)
    distances = np.sqrt(((_COLORS - color) ** 2).sum(1))
    nearest = int(distances.argmin())
    name = _NAMES[nearest] if distances[nearest] < _MAX_COLOR_DISTANCE else UNKNOWN
    # The share of the object's own, measured colour: robust against a shifted palette.
    reach = color - ground[box]
    shares = ((pixels[box] - ground[box]) * reach).sum(-1) / np.maximum((reach**2).sum(-1), 1.0)
    near = _dilate(mine) & (mine | (pieces[box] == 0))
    shares = np.where(near & (shares > 0.1), np.clip(shares, 0, 1), 0)
    area = float(shares.sum())
    y = float(shares.sum(1) @ np.arange(shares.shape[0])) / area
    x = float(shares.sum(0) @ np.arange(shares.shape[1])) / area
    shape, likeness = classify_shape(shares, y, x, area)
    share = area / pieces.size
    return DetectedObject(
        shape=shape,
        color=name,
        x=(x + box[1].start + 0.5) / width,
        y=(y + box[0].start + 0.5) / height,
        radius=math.sqrt(share / _templates()[2].get(shape, math.pi)),
        area=share,
        likeness=likeness,
    )


def classify_shape(
    shares: Float[np.ndarray, "height width"], y: float, x: float, area: float
) -> tuple[str, float]:
    """The shape whose template correlates best with a piece, and that correlation.

    The piece is resampled so that its centroid is in the middle and its area is 1: position and
    size drop out.

    Args:
        shares: Coverage in [0, 1] of every pixel around the piece.
        y: Row of its centroid.
        x: Column of its centroid.
        area: Sum of `shares`.
    """
    templates, names, _ = _templates()
    axis = _axis() * math.sqrt(area)
    rows, cols = np.broadcast_arrays(axis[:, None] + y, axis + x)
    sampled = ndimage.map_coordinates(shares, [rows, cols], order=1).ravel()
    sampled = sampled - sampled.mean()
    scores = templates @ (sampled / max(float(np.linalg.norm(sampled)), 1e-6))
    best = int(scores.argmax())
    likeness = float(scores[best])
    return (names[best] if likeness >= _MIN_LIKENESS else UNKNOWN), likeness


def _axis() -> np.ndarray:
    """Sample points of a template along one axis, in units of the root of the area."""
    return (np.arange(_GRID) + 0.5) * (2.2 / _GRID) - 1.1


@functools.cache
def _templates() -> tuple[np.ndarray, tuple[str, ...], dict[str, float]]:
    """Unit-norm templates (n, samples), their shapes, and each shape's area at radius 1."""
    fine = (np.arange(480) + 0.5) / 200 - 1.2
    rows, names, areas = [], [], {}
    for shape, degrees in itertools.product(SHAPES, _TEMPLATE_ANGLES):
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        u, v = c * fine + s * fine[:, None], c * fine[:, None] - s * fine
        inside = (signed_distance(shape, u, v) < 0).astype(np.float64)
        area = inside.sum() / 200**2
        y, x = ndimage.center_of_mass(inside)
        step = math.sqrt(area) * 200
        grid = np.meshgrid(_axis() * step + y, _axis() * step + x, indexing="ij")
        for blur in _TEMPLATE_BLURS:
            soft = ndimage.gaussian_filter(inside, blur * step)
            sampled = ndimage.map_coordinates(soft, grid, order=1).ravel()
            sampled -= sampled.mean()
            rows.append(sampled / np.linalg.norm(sampled))
            names.append(shape)
        areas[shape] = float(area)
    return np.stack(rows).astype(np.float32), tuple(names), areas


# Checking a claim


def relative_position(a: DetectedObject, b: DetectedObject) -> set[str]:
    """Where a lies as seen from b, by GenEval's rule.

    The offset of the centres, less a tenth of both boxes on each axis, must exceed half of the
    offset's length.
    """
    dx, dy = a.x - b.x, a.y - b.y
    slack = _POSITION_THRESHOLD * 2 * (a.radius + b.radius)
    half = 0.5 * math.hypot(dx, dy)
    found = set()
    if abs(dx) - slack > half:
        found.add("left of" if dx < 0 else "right of")
    if abs(dy) - slack > half:
        found.add("above" if dy < 0 else "below")
    return found


def _matches(
    objects: Sequence[DetectedObject],
    include: Sequence[Mapping[str, Any]],
    groups: tuple[tuple[DetectedObject, ...], ...] = (),
) -> Iterator[tuple[tuple[DetectedObject, ...], ...]]:
    """Every way to give each entry of a claim its own objects, with colours and positions right.

    GenEval takes the detector's most confident objects of a class; without confidences all ways
    are tried, which also reads "a red circle and a blue circle" right.
    """
    if len(groups) == len(include):
        yield groups
        return
    entry = include[len(groups)]
    used = {id(item) for group in groups for item in group}
    fitting = [
        item
        for item in objects
        if item.shape == entry["class"]
        and entry.get("color", item.color) == item.color
        and id(item) not in used
    ]
    for group in itertools.combinations(fitting, entry["count"]):
        if "position" in entry:
            relation, target = entry["position"]
            if not all(relation in relative_position(a, b) for a in group for b in groups[target]):
                continue
        yield from _matches(objects, include, (*groups, group))


def check_claim(
    picture: UInt8[np.ndarray, "height width 3"] | Sequence[DetectedObject],
    claim: Mapping[str, Any],
) -> bool:
    """Whether a picture holds what its caption claims, with GenEval's semantics.

    Every entry of "include" needs `count` objects of its class, in its colour and position where
    these are given; further objects are allowed, except that "counting" claims want no further
    object of a counted class, and that "exclude" names a count which a class must not reach.

    Args:
        picture: The pixels, or what `read_scene` read from them.
        claim: {"tag", "include", and optionally "exclude"}.
    """
    objects = read_scene(picture) if isinstance(picture, np.ndarray) else picture
    shapes = [item.shape for item in objects]
    limits = [(entry["class"], entry["count"]) for entry in claim.get("exclude", ())]
    if claim["tag"] == "counting":
        for name in {entry["class"] for entry in claim["include"]}:
            wanted = sum(e["count"] for e in claim["include"] if e["class"] == name)
            limits.append((name, wanted + 1))
    if any(shapes.count(name) >= limit for name, limit in limits):
        return False
    return next(_matches(objects, claim["include"]), None) is not None
