"""Why an update moves more bytes, takes more kernels or leaves more temporaries than its arrays alone would.

A key is a ``cost``, a cost with a storage, or ``("*", storage)`` for all rules with that storage. A rule declares its
cost, or it follows from the trees and sums that the rule asks for, see `cost_of`. `ledger.faults` names the keys that
are missing, and those that nothing needs.
"""

from __future__ import annotations

from jaxsgd.registry import Rule

__all__ = ["EXPLANATIONS", "SLOW_TO_COMPILE", "cost_of"]

SLOW_TO_COMPILE = ("decomposed",)
"""The costs of rules for which compilers take minutes on a large matrix."""

TREE_SUMS = (
    "Sums over all leaves come before the first step. One pass makes them, and a second one reads the same arrays "
    "again and steps. On H100 each sum of a leaf ends in a small kernel."
)
LEAF_NORMS = (
    "A norm or a mean over the leaf scales the step. One pass makes it, and a second one reads the same arrays again "
    "and steps. On H100 each sum of a leaf ends in a small kernel."
)
FACTORED = (
    "The gradient is read for the means of rows and columns, for the norm of the step, and for the step. "
    "Parameters are read for their norm and for the step. With the write that is 24 bytes a parameter, where the "
    "minimum is 12. No order of the sums saves a pass: the norm needs all factors, and these need the whole gradient. "
    "On H100 rows and columns are two passes. Each small result (a factor, a norm) is a kernel."
)
PRODUCTS = (
    "Newton-Schulz is fifteen products for a matrix, two more for a long one. Their factors and results pass through "
    "memory. On H100 the sums of the polynomial are kernels too. Temporaries are these factors, of one matrix at a "
    "time. Norms and means are further kernels."
)
DECOMPOSED = (
    "Products, roots and decompositions of matrices are extra work, with their own temporaries. On matrices as small "
    "as these the H100 compiler also cuts a product into parts, and a further kernel sums the parts."
)
LOW_RANK = (
    "The gradient is read for its image, for the norm that the limiter of growth needs, and for the step. Norms of "
    "columns are kernels too. Kernels on a few words recompute the random projection from its seed."
)
GRADIENT_KEPT = "The new state is the gradient itself, so a copy reads the gradient once more."
KEPT_IN_PLACE = (
    "On H100 the kernel still reads the array that one of its results should replace. So the compiler writes that "
    "result to other memory and copies it, one leaf at a time."
)
EIGHT_BITS = (
    "Where each number steps by itself, one kernel reads, unpacks, steps, packs and writes a matrix and its parameter. "
    "Where a rule needs the whole leaf, the largest value of a block must be known before its first code. So new "
    "moments are written in float32 and read again. On TPU they are also copied to another layout."
)

EXPLANATIONS: dict[str | tuple[str, str], str] = {
    "tree_sums": TREE_SUMS,
    "leaf_norms": LEAF_NORMS,
    "factored": FACTORED,
    "products": PRODUCTS,
    "decomposed": DECOMPOSED,
    "low_rank": LOW_RANK,
    "gradient_kept": GRADIENT_KEPT,
    "kept_in_place": KEPT_IN_PLACE,
    "random": "Small kernels make the counters of the random numbers, which are vectors. Bytes are at the minimum.",
    "trees": "The estimate of the Hessian, which only some steps make, is an array like the parameters. It is written "
    "and read.",
    ("step_averaged", "plain"): "On TPU the compiler makes two kernels. The second one needs the step of the first and "
    "computes it again from the old averages. So the first one's average is written to other memory and copied.",
    ("differences", "bf16"): KEPT_IN_PLACE,
    "sums_of_this_step": f"The sums for the next step's scale come from the same pass and end in small kernels. "
    f"{KEPT_IN_PLACE}",
    "sums_of_moments": f"{TREE_SUMS} The new moments of the first pass are kept for the second and copied.",
    "corrected_gradient": f"One pass makes the norm of the corrected gradient, and a second one steps. {GRADIENT_KEPT}",
    "bounds": "Kernels on vectors compute the bounds of rows and columns. On H100 one of the two maxima is a pass of "
    "its own, over an array that is kept for it.",
    "rows_with_gradient": "Only a whole row shows whether it has any gradient, so the step reads it again.",
    ("*", "int8"): EIGHT_BITS,
}


def cost_of(rule: Rule) -> str | None:
    """The key of a rule's cost: as it declares, else ``"trees"`` or ``"tree_sums"`` if it asks for these."""
    if rule.cost is not None:
        return rule.cost
    return "trees" if rule.trees is not None else "tree_sums" if rule.sums is not None else None
