"""Scenes that are drawn, with everything about each pixel known: class, depth, normal, edge.

A floor that falls away, and on it two to four balls, boxes and drums of random size, place and
colour, lit from a random side. What is nearer covers what is farther. The same seed gives the same
scenes on every machine.
"""

from __future__ import annotations

import numpy as np

SIZE = 128
CLASSES = ("floor", "ball", "box", "drum")
TRAIN_SEED, HELD_OUT_SEED = 1, 2
Maps = dict[str, np.ndarray]


def scenes(count: int, seed: int) -> Maps:
    """Return ``images`` uint8 [N, 128, 128, 3] and a map of labels for each task."""
    generator = np.random.default_rng(seed)
    drawn = [_scene(generator) for _ in range(count)]
    return {name: np.stack([one[name] for one in drawn]) for name in drawn[0]}


def held_out() -> Maps:
    """Return 48 scenes that training never saw, for ``mtl-export parity --dataset``."""
    return scenes(48, HELD_OUT_SEED)


def calibration() -> Maps:
    """Return 32 scenes of the kind that was trained on, for ``mtl-export calibrate --data``."""
    return {"images": scenes(32, TRAIN_SEED)["images"]}


def _scene(generator: np.random.Generator) -> Maps:
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] / (SIZE - 1) * 2 - 1
    slope, tilt = generator.uniform(0.5, 1.2), generator.uniform(-0.4, 0.4)
    depth = 3.2 - slope * rows + tilt * columns
    normal = np.broadcast_to(_unit(np.array([-tilt, slope, 1.0])), (SIZE, SIZE, 3)).copy()
    label = np.zeros((SIZE, SIZE), np.int64)
    instance = np.zeros((SIZE, SIZE), np.int64)
    colour = np.broadcast_to(generator.uniform(0.3, 0.9, 3), (SIZE, SIZE, 3)).copy()
    for number in range(1, generator.integers(2, 5) + 1):
        kind = int(generator.integers(1, len(CLASSES)))
        x, y = generator.uniform(-0.7, 0.7, 2)
        size, near = generator.uniform(0.2, 0.45), generator.uniform(1.2, 2.2)
        u, v = (columns - x) / size, (rows - y) / size
        inside, bulge, own = _shape(kind, u, v, generator.uniform(-0.5, 0.5, 2))
        distance = near - size * bulge
        front = inside & (distance < depth)
        depth = np.where(front, distance, depth)
        normal[front], label[front], instance[front] = own[front], kind, number
        colour[front] = generator.uniform(0.1, 1.0, 3)
    light = _unit(np.array([*generator.uniform(-1, 1, 2), 1.5]))
    shade = 0.35 + 0.65 * np.clip(normal @ light, 0, 1)
    pixels = colour * shade[..., None] + generator.normal(0, 0.03, colour.shape)
    return {
        "images": (np.clip(pixels, 0, 1) * 255).astype(np.uint8),
        "semseg": label,
        "depth": depth.astype(np.float32),
        "normals": normal.astype(np.float32),
        "edge": _edges(instance),
    }


def _shape(
    kind: int, u: np.ndarray, v: np.ndarray, lean: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return which pixels a shape covers, how far they bulge, and their normals."""
    flat = np.zeros_like(u)
    if kind == 1:
        bulge = np.sqrt(np.clip(1 - u**2 - v**2, 0, 1))
        return u**2 + v**2 < 1, bulge, np.stack([u, v, np.maximum(bulge, 1e-3)], -1)
    if kind == 2:
        plane = np.broadcast_to(_unit(np.array([*lean, 1.0])), (*u.shape, 3))
        return (abs(u) < 0.9) & (abs(v) < 0.8), -lean[0] * u - lean[1] * v, plane
    bulge = np.sqrt(np.clip(1 - u**2, 0, 1))
    return (abs(u) < 1) & (abs(v) < 0.9), bulge, np.stack([u, flat, np.maximum(bulge, 1e-3)], -1)


def _edges(instance: np.ndarray) -> np.ndarray:
    """Return 1 where a neighbour below or to the right belongs to something else."""
    edge = np.zeros_like(instance)
    edge[:-1] |= instance[:-1] != instance[1:]
    edge[:, :-1] |= instance[:, :-1] != instance[:, 1:]
    return edge


def _unit(vector: np.ndarray) -> np.ndarray:
    unit: np.ndarray = vector / np.linalg.norm(vector)
    return unit
