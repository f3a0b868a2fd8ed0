"""Measurements of one curve: its noise, levels, fall, spikes and oscillation. Plain NumPy.

Everything is equivariant: ``a * y + b`` with ``a > 0`` gives the same shares, periods and significances, and
levels that are moved and stretched with it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

__all__ = [
    "Oscillation", "Shape", "Spike", "autocorrelation", "averaged", "monotone", "noise", "oscillation",
    "running_median", "shape", "smooth", "spikes", "trend", "without", "without_pattern",
]  # fmt: skip

LONGEST = 2000
"""Points of the longest period that is looked for."""

SHORT, SINE, LOCKED, RETURN = 8, 0.9, 0.15, 0.5
"""Of a period of fewer points any pattern may look like a sine; the share of a sine in a ring; the share of the
variance that repeats exactly where the batches come in one order; the autocorrelation at which all comes back."""

TINY = 1e-12
"""Of the largest value: what a rounding in float64 makes of a constant."""


class Shape(NamedTuple):
    """Measurements of a falling curve. Errors are standard errors, from the noise of single points.

    Attributes:
      points: how many.
      start, start_error: the level it begins at: its first point, or a line through the first few where they are noisy.
      middle, end, end_error: the levels around the middle and over the last tenth.
      lowest: of the smoothed curve.
      highest: of the smoothed curve.
      noise: standard deviation of a single point over the last third.
      level_since: index from which the smoothed curve stays within 3% of its fall (or two errors) of the end.
      significance: the fall in its standard errors, or the slope of a line through all points in its own; 0 for a
        constant, below 0 where the curve rises.
      late_share, late_error: the share of the fall that the second half brings: 0.5 for a line, 0 where it is level.
        By the levels; where their noise hides it, by the exponential decay that fits best.
    """

    points: int
    start: float
    start_error: float
    middle: float
    end: float
    end_error: float
    lowest: float
    highest: float
    noise: float
    level_since: int
    significance: float
    late_share: float
    late_error: float

    @property
    def fall(self) -> float:
        return self.start - self.end


class Spike(NamedTuple):
    """A short jump. ``index`` of its top, ``height`` above the higher of its two feet, ``width`` at half the height."""

    index: int
    height: float
    width: int


class Oscillation(NamedTuple):
    """A rhythm around the best falling curve.

    Attributes:
      period: in points.
      regularity: the autocorrelation at the period; 1 for a pure tone, near 0 for noise.
      reversal: the autocorrelation at about half the period; negative where the curve swings.
      swing: from trough to crest, of the part that repeats.
      whole: whether the part that repeats does so after a whole number of points, as far as the longest lags can tell.
      sine: the share of a single sine in that part; 1 if ``whole`` is false.
    """

    period: float
    regularity: float
    reversal: float
    swing: float
    whole: bool
    sine: float

    @property
    def ordered(self) -> bool:
        """Whether it can be the order of the batches, the same in each epoch.

        That is a pattern of any form, with a period of a whole number of points. An oscillation is a sine, and its
        period is a whole number only by chance. Few points cannot tell the form."""
        return self.whole and not (round(self.period) >= SHORT and self.sine > SINE)


def _ratio(a: float, b: float) -> float:
    return a / b if b != 0 else (0.0 if a == 0 else math.copysign(math.inf, a))


def noise(y: np.ndarray) -> float:
    """The standard deviation of single points, from second differences: a slow trend and a few jumps do not count."""
    if len(y) < 3:
        return 0.0
    second = np.abs(y[:-2] - 2 * y[1:-1] + y[2:])
    sigma = float(np.median(second)) / (0.6745 * math.sqrt(6))
    return sigma if sigma > TINY * float(np.max(np.abs(y))) else 0.0


def smooth(y: np.ndarray, half: int | None = None) -> np.ndarray:
    """Running mean over ``2 * half + 1`` points (a tenth of the curve by default), fewer towards both ends.

    The first point stays as it is, so that a steep beginning is not flattened.
    """
    n = len(y)
    half = max(1, n // 20) if half is None else half
    total = np.concatenate([[0.0], np.cumsum(y - y[0])])
    at = np.arange(n)
    low, high = np.maximum(at - np.minimum(half, at), 0), np.minimum(at + np.minimum(half, at), n - 1)
    return y[0] + (total[high + 1] - total[low]) / (high + 1 - low)


def averaged(y: np.ndarray, decay: float, *, unbiased: bool = False) -> np.ndarray:
    """An exponential moving average of ``y``.

    Args:
      y: the values.
      decay: the weight of the average so far, in [0, 1).
      unbiased: begin at zero and divide by the weights so far, as Adam does. Default: False, begin at the first value.
    """
    mean, out = (0.0 if unbiased else float(y[0])) if len(y) else 0.0, []
    for i, value in enumerate(np.asarray(y, np.float64)):
        mean = decay * mean + (1 - decay) * value
        out.append(mean / (1 - decay ** (i + 1)) if unbiased else mean)
    return np.asarray(out)


def running_median(y: np.ndarray, half: int) -> np.ndarray:
    """The median of ``2 * half + 1`` points around each; the curve is mirrored at its ends."""
    padded = np.pad(y, half, mode="reflect")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)


def monotone(y: np.ndarray) -> np.ndarray:
    """The falling curve nearest to ``y`` in squares: neighbours that rise are pooled until none does."""
    means: list[float] = []
    counts: list[int] = []
    for value in y.tolist():
        mean, count = value, 1
        while means and means[-1] < mean:
            before, size = means.pop(), counts.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        means.append(mean)
        counts.append(count)
    return np.repeat(means, counts)


def trend(y: np.ndarray) -> tuple[float, float]:
    """The slope per point and its standard error, from the means of up to ten blocks: noise may last a few points."""
    n = len(y)
    if n < 3:
        return (float(y[-1] - y[0]) if n == 2 else 0.0), math.inf
    blocks = np.array_split(np.arange(n), min(10, n))
    x, z = (np.array([values[block].mean() for block in blocks]) for values in (np.arange(n), y - y[0]))
    x = x - x.mean()
    slope = float(x @ z) / float(x @ x)
    rest = z - z.mean() - slope * x
    return slope, math.sqrt(float(rest @ rest) / max(1, len(z) - 2) / float(x @ x))


def start_level(y: np.ndarray) -> tuple[float, float]:
    """The start of the curve, and its error: the longest line from the first point on that the shorter ones agree with.

    A curve that falls at once begins at its first point; one that barely moves at the mean of many.
    """
    sigma = max(noise(y[: max(8, len(y) // 5)]), noise(y) if len(y) < 16 else 0.0)
    level, error = float(y[0]), sigma
    size = 4
    while sigma and size <= max(4, len(y) // 4):
        x = np.arange(size) - (size - 1) / 2
        slope = float(x @ y[:size] / (x @ x))
        here = float(y[:size].mean()) + slope * x[0]
        rest = y[:size] - (here + slope * np.arange(size))
        if abs(here - level) > 2.5 * error or math.sqrt(float(rest @ rest) / (size - 2)) > 2 * sigma:
            break
        level, error = here, 2 * sigma / math.sqrt(size)
        size *= 2
    return float(level), float(error)


def shape(y: np.ndarray) -> Shape:
    """Levels, fall and noise of a finite curve, whose spikes are best taken out before (`without`)."""
    y = np.asarray(y, np.float64)
    if np.ptp(y) <= TINY * np.max(np.abs(y)):
        y = np.zeros_like(y) + y[0]
    n = len(y)
    tail = min(n, max(3, n // 10)) if n > 4 else 1
    first = (n - tail) // 2
    soft = smooth(y)
    start, start_error = start_level(y)
    sigma = noise(y[-max(8, n // 3) :])
    doubt = 1 + 6 / n  # the noise of a few points is itself badly known
    end, middle = float(np.median(y[-tail:])), float(np.median(y[first : first + tail]))
    last = soft[-tail:] if tail > 1 else y[-1:]
    end = 0.5 * (end + float(last.mean()))
    error = doubt * sigma * math.sqrt(2 / tail)  # neighbours are not quite independent
    band = max(0.03 * abs(start - end), 2 * error, TINY * float(np.max(np.abs(y))))
    away = np.flatnonzero(np.abs(soft - end) > band)
    away = away[away < n - tail]
    since = int(away[-1]) + 1 if len(away) else 0
    if abs(start - end) <= TINY * float(np.max(np.abs(y))):
        end = start
    fall = start - end
    significance = _ratio(fall, math.hypot(doubt * start_error, error))
    slope, slope_error = trend(y)
    if abs(slope) > 2.5 * slope_error:
        drift = _ratio(-slope, doubt * noise(y) * math.sqrt(12 / n**3))
        significance = max(significance, drift, key=abs)
    if n >= 40:
        # Where noise is large at first, the first points say little: then the first tenth against the last.
        significance = max(significance, _apart(y[: n // 10], y[-(n // 10) :])) if significance >= 0 else significance
    late, late_error = _ratio(middle - end, abs(fall)), abs(_ratio(math.sqrt(2) * error, fall))
    if late_error > 0.04 and n > 8:
        late = decay(y)
    low, high = float(soft.min()), float(soft.max())
    return Shape(n, start, start_error, middle, end, error, low, high, sigma, since, significance, late, late_error)


def _apart(sooner: np.ndarray, later: np.ndarray) -> float:
    """The fall from the mean of some points to that of others, in its standard errors (Welch 1947)."""
    error = math.sqrt(sooner.var(ddof=1) / len(sooner) + later.var(ddof=1) / len(later))
    return _ratio(float(sooner.mean() - later.mean()), error)


def decay(y: np.ndarray) -> float:
    """The late share of the exponential decay ``a + b exp(-t / tau)``, up to a straight line, that fits best."""
    n = len(y)
    t = np.arange(n) / n
    best, share = math.inf, 0.0
    for tau in [*np.geomspace(0.02, 2.0, 24), 20.0]:
        shape_of = np.exp(-t / tau)
        x = shape_of - shape_of.mean()
        b = float(x @ y) / float(x @ x)
        rest = y - y.mean() - b * x
        if (error := float(rest @ rest)) < best:
            half = math.exp(-0.5 / tau)
            best, share = error, half / (1 + half)
    return share


def spikes(y: np.ndarray, *, height: float = 0.25, sigmas: float = 8.0) -> list[Spike]:
    """Short jumps of at least ``height`` times the curve's fall and ``sigmas`` times the local noise.

    Short is a tenth of the curve at half the height. A last point that is high is none: it has not come back.
    """
    y = np.asarray(y, np.float64)
    n = len(y)
    if n < 6:
        return []
    fall = float(y[0] - np.median(y[-max(3, n // 10) :]))
    if fall <= 0:
        fall = float(np.quantile(y, 0.9) - np.quantile(y, 0.1))
    half = min(max(3, n // 12), n // 3, 50 if n <= 20_000 else 12)
    base = running_median(y, half)
    local = running_median(np.abs(y - base), half) / 0.6745
    need = np.maximum(height * fall, sigmas * local)
    top = np.flatnonzero((y[1:-1] > y[:-2]) & (y[1:-1] >= y[2:]) & ((y - base)[1:-1] > 0.6 * need[1:-1])) + 1
    out: list[Spike] = []
    for i in sorted(top[np.argsort(-y[top])][:64]):
        left = np.flatnonzero(y[:i] > y[i])
        right = np.flatnonzero(y[i + 1 :] > y[i])
        feet = y[left[-1] if len(left) else 0 : i].min(), y[i + 1 : i + 1 + (right[0] if len(right) else n)].min()
        rise = float(y[i] - max(feet))
        under = y <= y[i] - rise / 2
        before, after = np.flatnonzero(under[:i]), np.flatnonzero(under[i:])
        if rise < need[i] or rise <= 0 or not len(before) or not len(after):
            continue
        width = int(i + after[0] - before[-1] - 1)
        if width <= max(3, n // 10):
            out.append(Spike(int(i), rise, width))
    return out


def without(y: np.ndarray, found: list[Spike]) -> np.ndarray:
    """The curve with straight lines in place of its spikes."""
    keep = np.ones(len(y), bool)
    for one in found:
        keep[max(1, one.index - one.width) : one.index + 2 * one.width + 1] = False
    keep[0] = keep[-1] = True
    at = np.arange(len(y))
    return y if keep.all() else np.interp(at, at[keep], np.asarray(y)[keep])


def autocorrelation(r: np.ndarray, lags: int) -> np.ndarray:
    """At lags 0, 1, ..., ``lags``; pairs are fewer at long lags, which then count as much as short ones."""
    n = len(r)
    r = r - r.mean()
    if not r.any():
        return np.zeros(lags + 1)
    size = 1 << (n + lags).bit_length()
    sums = np.fft.irfft(np.abs(np.fft.rfft(r, size)) ** 2, size)[: lags + 1]
    return sums / (n - np.arange(lags + 1)) / (sums[0] / n)


def oscillation(y: np.ndarray) -> Oscillation | None:
    """The rhythm of the residuals from the nearest falling curve, or None.

    Noise has none: its autocorrelation stays within 3 / sqrt(points) of zero. A swing turns negative at half its period
    and comes back at the period, of which there must be three.
    """
    y = np.asarray(y, np.float64)
    rest = y - monotone(y)
    size = np.abs(rest)
    moving = np.flatnonzero(size > max(TINY * float(np.max(np.abs(y))), 1e-4 * float(np.ptp(y))))
    if len(moving) < 6:
        return None
    rest = rest[moving[0] :]
    n = len(rest)
    if n < 8:
        return None
    half = max(2, n // 8)
    local = np.sqrt(np.maximum(smooth(np.concatenate([rest[:1] ** 2, rest**2]), half)[1:], 0))
    level = np.divide(rest, local, out=np.zeros_like(rest), where=local > 0)
    level = np.clip(level, -2.5, 2.5)
    rho = autocorrelation(level, min(n // 3, LONGEST))
    repeat = _repeat(rho)
    need = max(0.25, 3 / math.sqrt(n))
    root = math.sqrt(float(rest @ rest) / n)
    best: Oscillation | None = None
    for half_period in range(1, len(rho) // 2 + 1):
        reversal = rho[half_period]
        if reversal > -need or reversal > rho[half_period - 1] or reversal > rho[min(half_period + 1, len(rho) - 1)]:
            continue
        window = np.arange(half_period + 1, min(len(rho), int(2.6 * half_period) + 1))
        if not len(window):
            break
        lag = int(window[np.argmax(rho[window])])
        if rho[lag] < need:
            continue
        if repeat is not None and repeat > 1.5 * lag and rho[repeat] > rho[lag] + 0.1 and rho[lag] < 3 / repeat**0.5:
            continue  # in a pattern of so few points that comes back it is chance
        crest = math.sqrt(2) if lag > 3 else 1.0  # over the root of the mean square: of a sine, of two or three levels
        swing = 2 * crest * root * math.sqrt(rho[lag])
        found = Oscillation(_peak(rho, lag), float(rho[lag]), float(reversal), swing, False, 1.0)
        if best is None or found.regularity > best.regularity + 0.1:
            best = found
    if repeat is not None and (best is None or rho[repeat] > best.regularity + 0.1):
        swing = 2 * math.sqrt(2 * rho[repeat]) * root
        exact = Oscillation(_peak(rho, repeat), float(rho[repeat]), float(rho[: repeat + 1].min()), swing, False, 1.0)
        exact = _refined(exact, level, rho, need)
        if exact.ordered:
            return exact
    return None if best is None else _refined(best, level, rho, need)


def _repeat(rho: np.ndarray) -> int | None:
    """The lag at which all comes back, whatever is between: a peak of at least `RETURN` after a fall of as much."""
    if len(rho) < 4:
        return None
    fallen = np.minimum.accumulate(rho)
    peaks = np.flatnonzero((rho[2:-1] >= rho[1:-2]) & (rho[2:-1] >= rho[3:])) + 2
    peaks = [int(i) for i in peaks if rho[i] > RETURN and rho[i] - fallen[i] > RETURN]
    return min(peaks, key=lambda i: (rho[i] < max(rho[peaks]) - 0.05, i), default=None)


def _refined(found: Oscillation, level: np.ndarray, rho: np.ndarray, need: float) -> Oscillation:
    """The same with its period by the longest lags at which it still repeats, and the form of what repeats."""
    period, count = found.period, 1
    while True:
        near = round((count + 1) * period)
        window = np.arange(max(near - 1, 1), min(near + 2, len(rho)))
        if near + 1 >= len(rho) or rho[window].max() < need:
            break
        count += 1
        period = _peak(rho, int(window[np.argmax(rho[window])])) / count
    length = round(period)
    last = [i for i in range(length, len(rho) - 1, length) if rho[i] >= need][-3:]  # nearly whole is off there
    peaks = all(rho[i] >= max(rho[i - 1], rho[i + 1]) for i in last)
    whole = abs(period - length) <= (0.02 if length < SHORT else 0.1) + 0.15 / count and peaks
    if whole:  # the batches of an epoch may look as if they came in the rhythm of two or three epochs
        enough = 0.85 * _repeated(level, length)
        parts = [d for d in range(2, length) if length % d == 0]
        length = next((d for d in parts if _repeated(level, d) >= enough > 0), length)
        period = period / round(round(period) / length)
        whole = _repeated(level, length) >= LOCKED
    sine = 1.0
    if whole:
        t = 2j * np.pi * np.arange(len(level)) / length
        tones = range(1, length // 2 + 1)
        powers = [abs(np.mean(level * np.exp(-k * t))) ** 2 / (1 + (2 * k == length)) for k in tones]
        sine = float(max(powers) / sum(powers)) if sum(powers) > 0 else 1.0
    return found._replace(period=period, whole=whole, sine=sine)


def _repeated(y: np.ndarray, period: int) -> float:
    """The share of the variance that repeats with a period of so many points, less what noise alone would have.

    The mean over up to four parts of the curve, since the batch that is hardest may become another one.
    """
    parts = min(4, max(1, len(y) // (4 * period)))
    shares = []
    for part in np.array_split(y, parts):
        n = len(part) // period * period
        if n < 2 * period or not part[:n].any():
            continue
        share = float(part[:n].reshape(-1, period).mean(0).var() / part[:n].var())
        shares.append((share - (period - 1) / n) / (1 - (period - 1) / n))
    return float(np.mean(shares)) if shares else 0.0


def without_pattern(y: np.ndarray, period: int) -> tuple[np.ndarray, float]:
    """The curve without what repeats each ``period`` points, and which share of its noise that was; 0 if too little.

    A point's part in the pattern is the median over the same point of two periods before and after. So the pattern may
    change slowly.
    """
    weights = np.ones(period) if period % 2 else np.array([0.5, *np.ones(period - 1), 0.5])
    n, half = len(y), len(weights) // 2
    rest = np.full(n + 4 * period, np.nan)
    rest[2 * period + half : 2 * period + n - half] = y[half : n - half] - np.convolve(y, weights / period, "valid")
    around = np.stack([rest[(2 + k) * period : (2 + k) * period + n] for k in (-2, -1, 1, 2)])
    seen = np.isfinite(around).any(0)
    repeated = np.where(seen, np.nanmedian(np.where(seen, around, 0.0), axis=0), 0.0)
    inside = slice(half, n - half)
    before = float(np.median(np.abs(rest[2 * period : 2 * period + n][inside])))
    after = float(np.median(np.abs(rest[2 * period : 2 * period + n][inside] - repeated[inside])))
    if before == 0 or after > 0.7 * before:
        return y, 0.0
    return y - repeated, 1 - (after / before) ** 2


def _peak(rho: np.ndarray, lag: int) -> float:
    """Between the lags: the top of the parabola through three."""
    if not 0 < lag < len(rho) - 1:
        return float(lag)
    a, b, c = rho[lag - 1 : lag + 2]
    bend = a - 2 * b + c
    return float(lag + (0.5 * (a - c) / bend if bend < 0 and abs(a - c) <= -2 * bend else 0.0))
