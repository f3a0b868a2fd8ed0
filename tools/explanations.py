"""Why an update moves more bytes, takes more kernels or leaves more temporaries than its arrays alone would.

A key is the ``cost`` that a rule declares or that follows from what it asks of the whole tree (see `cost_of`), such a
cost with a storage, or ``("*", storage)`` for all rules with that storage. `ledger.faults` names the keys
that are missing, and those that nothing needs.
"""

from __future__ import annotations

from jaxsgd.registry import Rule

__all__ = ["EXPLANATIONS", "SLOW_TO_COMPILE", "cost_of"]

SLOW_TO_COMPILE = ("decomposed",)
"""The costs of rules for which compilers take minutes on a large matrix."""

TREE_SUMS = (
    "sums over all leaves come before the first step: one pass makes them, a second one reads the same arrays again "
    "and steps; on H100 each sum of a leaf ends in a small kernel of its own."
)
LEAF_NORMS = (
    "a norm or a mean over the leaf scales the step: one pass makes it, a second one reads the same arrays again and "
    "steps; on H100 each sum of a leaf ends in a small kernel of its own."
)
FACTORED = (
    "the gradient is read for the means of rows and columns, for the norm of the step made of them, and for the step; "
    "parameters for their own norm and for the step. On H100 rows and columns are two passes. What is small (a factor, "
    "a norm) is a kernel each."
)
PRODUCTS = (
    "Newton-Schulz: fifteen products for a matrix, whose factors and results pass through memory (on H100 the sums of "
    "the polynomial too, as kernels of their own). Temporaries are these factors, of one matrix at a time; norms and "
    "means are further kernels."
)
DECOMPOSED = (
    "products, roots and decompositions of matrices are work of their own, with temporaries of their own; on matrices "
    "as small as these the H100 compiler also cuts a product into parts that are summed by a further kernel."
)
LOW_RANK = (
    "the gradient is read for its image, for the norm that the limiter of growth needs, and for the step; norms of "
    "columns are kernels of their own, and the random projection is recomputed from its seed by kernels on a few words."
)
GRADIENT_KEPT = "the new state is the gradient itself: a copy, which reads the gradient once more."
KEPT_IN_PLACE = (
    "on H100 the compiler does not write one of the results over an array that the kernel still reads: it writes it "
    "elsewhere and copies it, one leaf at a time."
)
EIGHT_BITS = (
    "where each number steps by itself, one kernel reads, unpacks, steps, packs and writes a matrix and its parameter. "
    "Where a rule looks at the whole leaf, the largest of a block must be known before its first code: new moments are "
    "written in float32 and read again, on TPU with copies to another layout."
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
    "random": "the counters of the random numbers are vectors made by small kernels; bytes are at the minimum.",
    "trees": "the estimate of the Hessian, which only some steps make, is an array like the parameters, written and "
    "read.",
    ("step_averaged", "plain"): "on TPU the compiler makes two kernels: the second one needs the step that the first "
    "made, makes it again from the old averages, and so the first one's average is written elsewhere and copied.",
    ("differences", "bf16"): KEPT_IN_PLACE,
    "sums_of_this_step": "sums for the next step's scale come from the same pass, and end in small kernels; "
    + KEPT_IN_PLACE,
    "sums_of_moments": TREE_SUMS[:-1] + ", and the new moments of the first pass are kept for the second and copied.",
    "corrected_gradient": "the norm of the corrected gradient: one pass makes it, a second one steps; and "
    + GRADIENT_KEPT,
    "bounds": "the bounds of rows and columns: kernels on vectors, and on H100 one of the two maxima is a pass of its "
    "own, over an array that is kept for it.",
    "rows_with_gradient": "whether a row has any gradient is known only when the whole row is read: the step reads it "
    "again.",
    ("*", "int8"): EIGHT_BITS,
}


def cost_of(rule: Rule) -> str | None:
    """The key of a rule's cost: as it declares, else ``"trees"`` or ``"tree_sums"`` if it asks for these."""
    if rule.cost is not None:
        return rule.cost
    return "trees" if rule.trees is not None else "tree_sums" if rule.sums is not None else None
