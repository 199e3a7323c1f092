"""Shapes in annotations: `Float[Tensor, "N K"]`, in the notation of jaxtyping.

Docstrings, formulas and annotations have the same names for axes:

=============  =====================================================================
N, M           samples of a data set, and of another one such as a test set
B              samples of a batch
K              outputs of the network
P, p           parameters, and features of a layer
T, R           vectors that share a pass, or ridges
m, k           modes, and those of a Krylov space
estimates      one from all random vectors, then those that leave one vector out
rows, columns  rows and columns of a kernel: N K of them, row n K + k for output k of sample n
N1, B2, ...    blocks of samples or of a batch
_              an axis of its own in every tensor of a sequence
=============  =====================================================================

`Float64` is that type alone, `Float` is any floating-point type and `Shaped` any type at all.

These names are `typing.Annotated`: to users and type checkers, an annotated tensor is a tensor. The tests put those of jaxtyping
in their place and check every shape with beartype (`tests/shape_checks.py`), and the documentation shows them.
"""

from typing import Annotated as Float
from typing import Annotated as Float64
from typing import Annotated as Int
from typing import Annotated as Shaped

__all__ = ["Float", "Float64", "Int", "Shaped"]
