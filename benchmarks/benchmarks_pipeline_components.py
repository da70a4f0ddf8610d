"""kfp's lightweight components for the pipeline benchmark (kfp reads no string annotations, hence a module of its own)."""

from typing import List  # noqa: UP035 - kfp reads this spelling

from kfp import dsl

IMAGE = "python:3.11"


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def kfp_add(a: int, b: int = 1) -> int:
    return a + b


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def kfp_numbers(n: int) -> List[int]:
    return list(range(n))


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def kfp_total(xs: List[int]) -> int:
    return sum(xs)
