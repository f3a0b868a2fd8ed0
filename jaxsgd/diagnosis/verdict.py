"""The words that tools use for a training, a learning rate and a layer: one word for one thing."""

from __future__ import annotations

import enum

__all__ = ["Verdict"]


class Verdict(enum.StrEnum):
    """The verdict of a tool on a run, a learning rate or a layer. A member equals its text: ``Verdict.GOOD == "good"``.

    `jaxsgd.diagnose` says of a curve one of the first nine, in this order of weight. `jaxsgd.probe` says of a rate
    ``"diverged"``, ``"oscillating"``, ``"too low"``, ``"too high"`` or ``"good"``.

    Attributes:
      sentence: the meaning.

    >>> Verdict("too slow").sentence
    'the loss falls steadily, and its end is far from level'
    """

    sentence: str

    def __new__(cls, text: str, sentence: str) -> Verdict:
        made = str.__new__(cls, text)
        made._value_ = text
        made.sentence = sentence
        return made

    DIVERGED = "diverged", "the loss is not finite, or ends above its start, or has lost most of its decrease again"
    STUCK = "stuck", "the loss has not moved by more than its noise"
    SPIKES = "spikes", "the loss jumps for a few steps and comes back"
    OSCILLATING = "oscillating", "the loss swings with a period around its way down"
    OVERFITTING = "overfitting", "the validation loss rises while the training loss falls"
    PLATEAU = "plateau", "the loss is level, well above a loss that is known to be possible"
    TOO_SLOW = "too slow", "the loss falls steadily, and its end is far from level"
    GOOD = "good", "the loss falls fast and then slower, or has become level"
    TOO_SHORT = "too short", "there are too few points to say anything else"

    TOO_LOW = "too low", "the rate lowers the loss by less than the best rate does, and is below it"
    TOO_HIGH = "too high", "the rate lowers the loss by less than the best rate does, and is above it"

    EPOCH_PATTERN = "epoch pattern", "the loss repeats a pattern each epoch, as the order of the batches does"
    NOT_FINITE = "not finite", "the loss was not finite in between and came back"

    DEAD_LAYERS = "dead layers", "the gradient is zero, or a millionth of that of the other layers"
    FROZEN_LAYERS = "frozen layers", "a gradient arrives but the parameter does not move"
    EXPLODING_LAYERS = "exploding layers", "the gradient is not finite, or has grown a hundredfold"
    RATIO_TOO_LARGE = "ratio too large", "a step moves the parameter by more than a tenth of its size"
    RATIO_TOO_SMALL = "ratio too small", "a step moves the parameter by less than a hundred-thousandth of its size"

    @classmethod
    def of_curves(cls) -> tuple[Verdict, ...]:
        """The main verdicts of `jaxsgd.diagnose`, the weightiest first."""
        return tuple(cls)[:9]
