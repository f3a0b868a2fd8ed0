"""Draw the paths of rules on a landscape in two dimensions.

python examples/paths.py --landscape rosenbrock --rules momentum=0.0005,adam=0.05 --out paths.png
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from jaxsgd.plot import LANDSCAPES, paths, save
from jaxsgd.registry import all_rules

BOWL = (
    "sgd=0.08,momentum=0.03,nesterov=0.03,adagrad=0.5,rmsprop=0.1,adadelta=20,adam=0.2,nadam=0.15,"
    "amsgrad=0.2,adamax=0.3,lion=0.08,schedule_free_adamw=0.3"
)


def chosen(text: str) -> dict[str, float]:
    """``"adam=0.1,sgd=0.01"`` as rule -> learning rate.

    Raises:
      ValueError: an entry that is not ``rule=number``; `KeyError` for a rule that does not exist.
    """
    out = {}
    for entry in text.split(","):
        name, _, rate = entry.partition("=")
        _ = all_rules()[name.strip()]
        try:
            out[name.strip()] = float(rate)
        except ValueError:
            raise ValueError(f"--rules: {entry!r} is not rule=learning_rate") from None
    return out


def main(argv: list[str] | None = None) -> pathlib.Path:
    """Draw, write the picture, and return where it is."""
    parser = argparse.ArgumentParser(description="Paths of rules on a landscape.")
    parser.add_argument("--landscape", choices=sorted(LANDSCAPES), default="bowl")
    parser.add_argument("--rules", default=BOWL, help="rule=learning_rate, separated by commas")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--columns", type=int, default=4)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/paths.png"))
    args = parser.parse_args(argv)
    try:
        rates = chosen(args.rules)
        drawn = {f"{name}({rate:g})": all_rules()[name](rate) for name, rate in rates.items()}
        figure = paths(drawn, args.landscape, args.steps, columns=args.columns)
        out = save(figure, args.out)
    except (KeyError, ValueError, OSError) as error:
        print(f"paths: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {out}")
    return out


if __name__ == "__main__":
    main()
