"""Run the conformance kit on optax's own rules and write what it finds.

    python examples/conformance.py --out docs/conformance.md

Nothing here knows what to expect: the kit is given optax's functions and, to compare with, jaxsgd's rules that follow
torch.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable

import optax

import jaxsgd
from jaxsgd.testing import LAWS, compare, laws_broken

RULES: dict[str, Callable[..., optax.GradientTransformation]] = {
    name: getattr(optax, name)
    for name in (
        "adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamaxw", "adamw", "adan", "amsgrad",
        "fromage", "lamb", "lars", "lion", "nadam", "nadamw", "noisy_sgd", "novograd", "optimistic_adam_v2",
        "optimistic_gradient_descent", "radam", "rmsprop", "rprop", "sgd", "sign_sgd", "signum", "sm3", "yogi",
    )
} | {
    f"contrib.{name}": getattr(optax.contrib, name)
    for name in (
        "acprop", "ademamix", "simplified_ademamix", "adopt", "cocob", "dadapt_adamw", "dog", "dowg", "galore",
        "madgrad", "momo", "momo_adam", "muon", "prodigy", "schedule_free_adamw", "schedule_free_sgd", "sophia",
    )
}  # fmt: skip

TORCH: dict[str, tuple[optax.GradientTransformation, optax.GradientTransformation]] = {
    "sgd with momentum": (optax.sgd(1e-2, 0.9), jaxsgd.torch.SGD(lr=1e-2, momentum=0.9)),
    "adam": (optax.adam(1e-2), jaxsgd.torch.Adam(lr=1e-2)),
    "adamw, same decay": (optax.adamw(1e-2, weight_decay=0.01), jaxsgd.torch.AdamW(lr=1e-2)),
    "amsgrad": (optax.amsgrad(1e-2), jaxsgd.torch.Adam(lr=1e-2, amsgrad=True)),
    "nadam": (optax.nadam(1e-2), jaxsgd.torch.NAdam(lr=1e-2)),
    "radam": (optax.radam(1e-2), jaxsgd.torch.RAdam(lr=1e-2)),
    "adamax": (optax.adamax(1e-2), jaxsgd.torch.Adamax(lr=1e-2)),
    "rmsprop, same decay": (optax.rmsprop(1e-2, 0.99), jaxsgd.torch.RMSprop(lr=1e-2)),
    "adagrad, same start": (optax.adagrad(1e-2, 0.0), jaxsgd.torch.Adagrad(lr=1e-2)),
    "adadelta": (optax.adadelta(1.0), jaxsgd.torch.Adadelta(lr=1.0)),
}
"""optax's rule beside torch's of the same name, in the settings that both have."""


def report() -> str:
    """The findings as Markdown."""
    lines = [
        "# What the conformance kit finds in optax",
        "",
        f"optax {optax.__version__}, by `python examples/conformance.py`. Written by the kit, not by hand.",
        "",
        "## Laws",
        "",
        *(f"- **{name}**: {' '.join((law.__doc__ or '').split())}" for name, law in LAWS.items()),
        "",
        "| rule | laws that do not hold |",
        "| --- | --- |",
    ]
    for name, make in sorted(RULES.items()):
        broken = laws_broken(make)
        shown = "<br>".join(f"{b}".replace("|", "/") for b in broken) or "all hold"
        lines.append(f"| `{name}` | {shown} |")
    lines += ["", "## Same name in torch", "", "Fifty steps in float64; agreement is 1e-12 of a leaf's trajectory.", ""]
    lines += ["| rule | optax against torch |", "| --- | --- |"]
    for name, (theirs, torch) in TORCH.items():
        found = compare(theirs, torch, gradients=("normal", "sparse"))
        lines.append(f"| {name} | {'<br>'.join(' '.join(str(c).split()) for c in found)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Run the conformance kit on optax's own rules.")
    parser.add_argument("--out", type=pathlib.Path, help="a file to write; by default the report is printed")
    args = parser.parse_args(argv)
    text = report()
    if args.out is None:
        print(text)
    else:
        args.out.write_text(text)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
