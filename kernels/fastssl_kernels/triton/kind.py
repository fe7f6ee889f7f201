"""What a kernel argument is, as an annotation: Triton ignores it, and `configuration` compiles ahead of time by it.

Kernels write `kind.Count`: Triton compares names imported from a module at every launch, but not a module's
attributes.
"""

from __future__ import annotations

from typing import Any


class Elements(Any):
    """Pointer to the dtype that a configuration varies: of a queue, a bank or a result."""

    triton = "*{dtype}"


class Floats(Any):
    """Pointer to float32."""

    triton = "*fp32"


class Levels(Any):
    """Pointer to float32 if that is the configuration's dtype, else to float16."""

    triton = "*{level}"


class Bytes(Any):
    """Pointer to uint8."""

    triton = "*u8"


class Bools(Any):
    """Pointer to bool."""

    triton = "*u1"


class Longs(Any):
    """Pointer to int64."""

    triton = "*i64"


class Count(Any):
    """int32."""

    triton = "i32"


class Multiple(Any):
    """int32 that is a multiple of 16: the width of rows, a stride, a split length."""

    triton = "i32"


class Entries(Any):
    """int32 that is a multiple of 16 where the kernel's constant FULL is true."""

    triton = "i32"


class Factor(Any):
    """float32."""

    triton = "fp32"
