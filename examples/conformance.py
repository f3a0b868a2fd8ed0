"""Run the conformance kit on optax's own rules and write its findings.

    python examples/conformance.py --out docs/conformance.md

No result is expected here. The kit gets optax's functions and, to compare with, jaxsgd's rules that follow torch.
"""

from __future__ import annotations

import argparse
import pathlib
from collections import Counter
from collections.abc import Callable

import optax

import jaxsgd
from jaxsgd.testing import LAWS, Broken, compare, laws_broken

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


HEAD = """# The conformance kit's findings in optax

Made by `python examples/conformance.py --out docs/conformance.md` with optax {version}, in about three minutes on two
CPU cores; not written by hand. The kit is `jaxsgd.testing`. One finding, reproduced:

```python
import optax
from jaxsgd.testing import laws_broken

for broken in laws_broken(optax.adam, ["moments", "zero"]):
    print(broken)
```

A law that does not hold is not always a mistake. 16-bit moments save memory, few programs use strict promotion, and a
sum over all parameters spreads NaN. [Differences from optax](divergences.md) has the cases that matter for training.

## Laws

The last column counts the rules of optax, out of {count}, for which the law does not hold.

| law | meaning | does not hold |
| --- | --- | ---: |"""


def report() -> str:
    """The findings as Markdown."""
    findings = {name: laws_broken(make) for name, make in sorted(RULES.items())}
    broken = Counter(finding.law for found in findings.values() for finding in found)
    lines = [HEAD.format(version=optax.__version__, count=len(RULES))]
    lines += [f"| {name} | {' '.join((law.__doc__ or '').split())} | {broken[name]} |" for name, law in LAWS.items()]
    lines += ["", "## Rule by rule", "", "| rule | laws that do not hold |", "| --- | --- |"]
    for name, found in findings.items():
        lines.append(f"| `{name}` | {'<br>'.join(map(shortened, found)) or 'all hold'} |")
    lines += ["", "## Same name in torch", ""]
    lines += ["Fifty steps in float64; agreement is 1e-12 of the largest value of a leaf's trajectory.", ""]
    lines += ["| rule | optax against torch |", "| --- | --- |"]
    for name, (theirs, torch) in TORCH.items():
        walks = compare(theirs, torch, gradients=("normal", "sparse"))
        lines.append(f"| {name} | {'<br>'.join(' '.join(str(walk).split()) for walk in walks)} |")
    return "\n".join(lines) + "\n"


def shortened(finding: Broken) -> str:
    """A finding in one table cell: the law, and at most 90 characters of the reason."""
    text = str(finding).replace("|", "/").removesuffix(", but they differ:")
    return text if len(text) <= 100 else f"{text[:98].rsplit(' ', 1)[0]} ..."


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
