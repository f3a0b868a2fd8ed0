"""Plan a train step for hardware you do not have: does it fit, and what does it cost?

The compilers for TPU (``jaxsgd[tpu]``) and CUDA (``jaxsgd[cuda]``) run on any machine. Here they compile the same step
that `jaxsgd.make_step` would run, from shapes alone. `plan` reads their answer:

    answer = jaxsgd.plan(loss_fn, init, tx, batch, topology="v5e:4x4", zero1="data")
    print(answer)
    jaxsgd.planning.compare([{"topology": "v5e:4x4"}, {"topology": "h100:8"}], loss_fn, init, tx, batch)
"""

from jaxsgd.planning.comparison import Comparison
from jaxsgd.planning.devices import known
from jaxsgd.planning.plan import compare
from jaxsgd.planning.result import Bound, Plan, Suggestion

__all__ = ["Bound", "Comparison", "Plan", "Suggestion", "compare", "known"]
