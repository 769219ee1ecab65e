"""Which axes of the mesh the parameters are divided over: one table for each kind of tree.

A rule is a regular expression that is searched for in a parameter's path ("layers/query/kernel", with what it stands in
before that) and the axes of its *last* dimensions; the dimensions before them (layers, or the models of a reference)
stay whole. The first rule that fits counts. Matrices that read the residual stream are divided by rows over "fsdp" and
by columns over "tensor", those that write it the other way round, so that a layer sums over "tensor" twice; experts lie
on "expert". What is small is on every device.
"""
from __future__ import annotations

Rule = tuple[str, tuple[str | tuple[str, ...] | None, ...]]

DECODER: tuple[Rule, ...] = (
    (r"(^|/)(un)?embed$", ("tensor", "fsdp")),
    (r"(^|/)positions$", (None, "fsdp")),
    (r"(^|/)layers/(query|key|value|gate|up)/kernel$", ("fsdp", "tensor")),
    (r"(^|/)layers/(query|key|value|gate|up)/(bias|kernel_scale)$", ("tensor",)),
    (r"(^|/)layers/(out|down)/kernel$", ("tensor", "fsdp")),
    (r"(^|/)layers/(out|down)/(bias|kernel_scale)$", ()),
    (r"(^|/)layers/experts/router/", ()),
    (r"(^|/)layers/experts/(gate|up)$", ("expert", "fsdp", "tensor")),
    (r"(^|/)layers/experts/(gate|up)_scale$", ("expert", "tensor")),
    (r"(^|/)layers/experts/down$", ("expert", "tensor", "fsdp")),
    (r"(^|/)layers/experts/down_scale$", ("expert", None)),
    (r"(^|/)(layers/\w+_)?norm/(scale|bias)$", ()),
)
"""Of all decoders: base, reference, student, and the trunk that `policy.kind="full"` trains."""

ADAPTER: tuple[Rule, ...] = (
    (r"(^|/)adapter/(query|key|value|gate|up)/a$", ("fsdp", None)),
    (r"(^|/)adapter/(query|key|value|gate|up)/b$", (None, "tensor")),
    (r"(^|/)adapter/(out|down)/a$", ("tensor", None)),
    (r"(^|/)adapter/(out|down)/b$", (None, "fsdp")),
)
"""Of `policy.kind="lora"`: as the matrices that they change."""

HEAD: tuple[Rule, ...] = (
    (r"^opt_state/.*(^|/)actor/table$", (("tensor", "expert"), None)),
    (r"(^|/)actor/table$", ("tensor", None)),
    (r"(^|/)(actor|scalars)/", ()),
)
"""Of the actor, the value head and the budget neuron. A linear actor is as large as several unembeddings, and is
divided as one; what the optimizer keeps of it over "expert", too (as MOMENTS)."""

MOMENTS: tuple[Rule, ...] = tuple(
    (r"^opt_state/.*" + pattern, tuple(("fsdp", "expert") if axis == "fsdp" else axis for axis in axes))
    for pattern, axes in DECODER if "expert" not in axes)
"""Of what the optimizer keeps of a trained trunk. It is read once an update, so that what is not an expert's lies
divided over "expert" too, where the parameters are whole. Idea: Rajbhandari et al. (2020), "ZeRO", stage 1."""

STATE: tuple[Rule, ...] = (
    (r"^(seed|iteration)$", ()), (r"^controller/", ()), (r"^opt_state/(.*/)?count$", ()), *HEAD, *ADAPTER, *MOMENTS,
    *DECODER)
"""Of a train state: parameters, what the optimizer keeps of them, and what a reference remembers of them."""
