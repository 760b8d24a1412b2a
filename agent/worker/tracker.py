"""Who is who from frame to frame: detections joined to tracks over time.

Two rounds as in ByteTrack (Zhang et al., 2022): sure detections first, then unsure ones for tracks that found none. Motion is a constant
velocity Kalman filter in seconds, not frames, for an edge device's frame rate is not constant.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict, List, Mapping, Sequence, Tuple

import numpy as np
from numpy.typing import NDArray

from agent.worker.assignment import best_pairs
from models.tasks.detection import Detection

Boxes = NDArray[np.float64]

# Deviations as shares of an object's size, and of its size per second: where a box is measured to be; how fast an object may be when
# first seen; how much its speed may change within a second. Position and extent apart, since extent hardly changes.
MEASURED = np.array((0.05, 0.05, 0.08, 0.08))
FIRST_SPEED = np.array((3.0, 3.0, 0.3, 0.3))
CHANGE = np.array((1.5, 1.5, 0.2, 0.2))
GROWTH_LIMIT = 0.75
OTHER_LABEL = 0.6
SAME_OBJECT = 0.75
TWICE_SEEN = 0.6


@dataclass(frozen=True)
class TrackerSettings:
    """sure: score from which a detection may begin a track, `sure_of` some labels another; forget_s: how long a track lives unseen, half of
    it while unconfirmed; unsure_s: how long on unsure detections alone, which are as often a shadow or a reflection where the object has
    been."""

    sure: float = 0.5
    confirm_hits: int = 2
    forget_s: float = 1.0
    unsure_s: float = 3.0
    min_similarity: float = 0.15
    sure_of: Mapping[str, float] = field(default_factory=dict)

    def is_sure(self, detection: Detection) -> bool:
        return detection.score >= self.sure_of.get(detection.label, self.sure)


@dataclass(frozen=True)
class Track:
    """One object as it is known at one moment; `score` of the last detection, box in pixels, `label` by majority of scores.

    first_s, last_s, sure_s: when it was first seen, last seen, and last seen surely
    """

    track: int
    label: str
    score: float
    x0: float
    y0: float
    x1: float
    y1: float
    is_confirmed: bool
    is_seen: bool
    first_s: float
    last_s: float
    sure_s: float


@dataclass(frozen=True)
class Update:
    """`tracks` are alive, seen in this frame or not; `ended` were forgotten in it."""

    tracks: Tuple[Track, ...]
    ended: Tuple[Track, ...]


@dataclass
class _Life:
    track: int
    first_s: float
    last_s: float
    score: float
    sure_s: float
    hits: int = 1
    votes: Dict[str, float] = field(default_factory=dict)
    label: str = ""

    def saw(self, detection: Detection, at_s: float, is_sure: bool) -> None:
        votes = self.votes[detection.label] = self.votes.get(detection.label, 0.0) + detection.score
        if detection.label != self.label and votes > self.votes.get(self.label, 0.0):
            self.label = detection.label
        self.score, self.last_s = detection.score, at_s
        if is_sure:
            self.sure_s = at_s


class Tracker:
    """Tracks of one camera. Track numbers begin at 1 and are never used twice."""

    def __init__(self, settings: TrackerSettings) -> None:
        self.settings = settings
        self._lives: List[_Life] = []
        self._mean = np.zeros((0, 4, 2))  # cx, cy, w, h: value and speed
        self._spread = np.zeros((0, 4, 3))  # their variance, covariance, variance of the speed
        self._at_s = 0.0
        self._number = 0

    def update(self, detections: Sequence[Detection], at_s: float) -> Update:
        """Take in the detections of a frame taken at `at_s`, also the unsure ones; time never runs backwards here."""
        at_s = max(at_s, self._at_s)
        self._predict(at_s - self._at_s)
        self._at_s = at_s
        distinct = distinct_objects(detections)
        sure = [each for each in distinct if self.settings.is_sure(each)]
        unsure = [each for each in distinct if not self.settings.is_sure(each)]
        known = [index for index, life in enumerate(self._lives) if self._is_confirmed(life)]
        fresh = [index for index, life in enumerate(self._lives) if not self._is_confirmed(life)]
        pairs, left = self._join(known, sure)
        taken = {index for index, _ in pairs}
        weak, _ = self._join([index for index in known if index not in taken], unsure)
        # What was seen once so far takes only what nobody known lays claim to: it may have been half of one of those.
        first, left = self._join(fresh, left)
        new = self._apart_from([detection for _, detection in pairs + first], left)
        self._correct(pairs + weak + first, at_s)
        ended = self._forget(at_s)
        self._begin(new, at_s)
        return Update(self._tracks(), ended)

    def hold(self, at_s: float) -> Update:
        """Take in a picture in which nothing moved since the last one: what was seen in that is where it was, and seen as it was then.

        What was not seen in it grows older, and is forgotten in its time.
        """
        passed_s = max(0.0, at_s - self._at_s)
        for life in self._lives:
            if life.last_s == self._at_s:
                life.last_s, life.sure_s = life.last_s + passed_s, life.sure_s + passed_s
        self._at_s += passed_s
        self._mean[:, :, 1] = 0.0
        ended = self._forget(self._at_s)
        return Update(self._tracks(), ended)

    @property
    def needs_another_look(self) -> bool:
        """Whether somebody is known who was not seen in the last picture, or was seen but once."""
        return any(life.last_s != self._at_s or not self._is_confirmed(life) for life in self._lives)

    def forget_all(self) -> Tuple[Track, ...]:
        """End every track, since nobody looks any more: a camera that is gone tells nothing about who left."""
        ended = self._tracks()
        self._lives, self._mean, self._spread = [], self._mean[:0], self._spread[:0]
        return ended

    def _join(self, candidates: Sequence[int], detections: Sequence[Detection]) -> Tuple[List[Tuple[int, Detection]], List[Detection]]:
        """Pairs of track index and detection, and the detections that are left."""
        if not candidates or not detections:
            return [], list(detections)
        rows = list(candidates)
        predicted = self._mean[rows, :, 0]
        # A track is looked for within one deviation of where it should be: a new one's speed is not known yet.
        doubt = np.minimum(np.sqrt(self._spread[rows, :2, 0]), GROWTH_LIMIT * predicted[:, 2:])
        similarity = _overlaps(_corners(predicted), _boxes(detections), doubt)
        known, seen = np.array([self._lives[index].label for index in rows]), np.array([each.label for each in detections])
        similarity *= np.where(known[:, None] == seen, 1.0, OTHER_LABEL)
        similarity[similarity < self.settings.min_similarity] = 0.0
        pairs = best_pairs(similarity)
        used = {column for _, column in pairs}
        return [(rows[row], detections[column]) for row, column in pairs], [each for i, each in enumerate(detections) if i not in used]

    @staticmethod
    def _apart_from(matched: Sequence[Detection], left: Sequence[Detection]) -> List[Detection]:
        """Those left that are not for the most part a matched one of the same label seen a second time."""
        if not matched or not left:
            return list(left)
        overlaps = _overlaps(_boxes(left), _boxes(matched), np.zeros((len(left), 2)))
        labels = np.array([each.label for each in left])[:, None] == np.array([each.label for each in matched])
        return [each for each, doubled in zip(left, (labels & (overlaps > TWICE_SEEN)).any(axis=1)) if not doubled]

    def _predict(self, passed_s: float) -> None:
        if not self._lives or passed_s <= 0:
            return
        size = self._size(self._mean)
        change = (CHANGE * size) ** 2
        place, both, speed = (self._spread[:, :, index] for index in range(3))
        self._mean[:, :, 0] += self._mean[:, :, 1] * passed_s
        self._mean[:, 2:, 0] = np.maximum(self._mean[:, 2:, 0], 1.0)
        place += 2 * passed_s * both + passed_s**2 * speed + change * passed_s**3 / 3
        both += passed_s * speed + change * passed_s**2 / 2
        speed += change * passed_s

    def _correct(self, pairs: Sequence[Tuple[int, Detection]], at_s: float) -> None:
        if not pairs:
            return
        rows = [index for index, _ in pairs]
        measured = _centres(_boxes([detection for _, detection in pairs]))
        mean, spread = self._mean[rows], self._spread[rows]
        noise = (MEASURED * self._size(mean)) ** 2
        gain = spread[:, :, :2] / (spread[:, :, :1] + noise[:, :, None])
        off = measured - mean[:, :, 0]
        self._mean[rows] = mean + gain * off[:, :, None]
        place, both, speed = spread[:, :, 0], spread[:, :, 1], spread[:, :, 2]
        self._spread[rows] = np.stack([place * (1 - gain[:, :, 0]), both * (1 - gain[:, :, 0]), speed - gain[:, :, 1] * both], axis=2)
        for index, detection in pairs:
            self._lives[index].hits += 1
            self._lives[index].saw(detection, at_s, self.settings.is_sure(detection))

    def _begin(self, detections: Sequence[Detection], at_s: float) -> None:
        if not detections:
            return
        centres = _centres(_boxes(detections))
        mean = np.stack([centres, np.zeros_like(centres)], axis=2)
        size = self._size(mean)
        spread = np.stack([(MEASURED * size) ** 2, np.zeros_like(centres), (FIRST_SPEED * size) ** 2], axis=2)
        self._mean, self._spread = np.concatenate([self._mean, mean]), np.concatenate([self._spread, spread])
        for detection in detections:
            self._number += 1
            life = _Life(self._number, at_s, at_s, detection.score, at_s)
            life.saw(detection, at_s, is_sure=True)
            self._lives.append(life)

    def _forget(self, at_s: float) -> Tuple[Track, ...]:
        limit_s = self.settings.forget_s
        kept = [
            at_s - life.last_s <= (limit_s if self._is_confirmed(life) else limit_s / 2) and at_s - life.sure_s <= self.settings.unsure_s
            for life in self._lives
        ]
        if all(kept):
            return ()
        ended = tuple(track for track, keep in zip(self._tracks(), kept) if not keep)
        self._lives = [life for life, keep in zip(self._lives, kept) if keep]
        self._mean, self._spread = self._mean[kept], self._spread[kept]
        return ended

    def _tracks(self) -> Tuple[Track, ...]:
        return tuple(
            Track(
                life.track, life.label, life.score, box[0], box[1], box[2], box[3],
                self._is_confirmed(life), life.last_s == self._at_s, life.first_s, life.last_s, life.sure_s,
            )
            for life, box in zip(self._lives, _corners(self._mean[:, :, 0]).tolist())
        )  # fmt: skip

    def _is_confirmed(self, life: _Life) -> bool:
        return life.hits >= self.settings.confirm_hits

    @staticmethod
    def _size(mean: NDArray[np.float64]) -> NDArray[np.float64]:
        """Side of the square of a box's area, [N,1]."""
        return np.asarray(np.sqrt(np.maximum(mean[:, 2, 0] * mean[:, 3, 0], 1.0))[:, None])


def distinct_objects(detections: Sequence[Detection]) -> List[Detection]:
    """The detections, best first, without those that lie over a better one of any label: one object that looked like two things."""
    ranked = sorted(detections, key=lambda each: -each.score)
    if len(ranked) < 2:
        return ranked
    boxes = _boxes(ranked)
    same = _overlaps(boxes, boxes, np.zeros((len(ranked), 2))) > SAME_OBJECT
    kept: List[int] = []
    for index in range(len(ranked)):
        if not same[index, kept].any():
            kept.append(index)
    return [ranked[index] for index in kept]


def _boxes(detections: Sequence[Detection]) -> Boxes:
    return np.array([(each.x0, each.y0, each.x1, each.y1) for each in detections], np.float64).reshape(-1, 4)


def _centres(boxes: Boxes) -> Boxes:
    return np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1)


def _corners(centres: Boxes) -> Boxes:
    return np.concatenate([centres[:, :2] - centres[:, 2:] / 2, centres[:, :2] + centres[:, 2:] / 2], axis=1)


def _overlaps(one: Boxes, other: Boxes, grown: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union [len(one), len(other)]; boxes of a pair are both grown by `grown` [len(one), 2] on each side."""
    # Axis by axis, without arrays of [N,M,2]: the same figures in half the time at 20 objects.
    shared = area_one = area_other = np.ones((1, 1))
    for axis in (0, 1):
        more = grown[:, axis, None]
        low, high = one[:, axis, None] - more, one[:, axis + 2, None] + more
        other_low, other_high = other[None, :, axis] - more, other[None, :, axis + 2] + more
        shared = shared * np.maximum(np.minimum(high, other_high) - np.maximum(low, other_low), 0.0)
        area_one = area_one * (high - low)
        area_other = area_other * (other_high - other_low)
    return np.asarray(shared / np.maximum(area_one + area_other - shared, 1e-9))
