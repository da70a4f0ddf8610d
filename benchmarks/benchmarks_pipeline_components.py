"""kfp's lightweight components for the pipeline benchmark, apart because kfp reads no string annotations."""

from kfp import dsl

IMAGE = "python:3.11"


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def kfp_add(a: int, b: int = 1) -> int:
    return a + b


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def kfp_numbers(n: int) -> list[int]:
    return list(range(n))


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def kfp_total(xs: list[int]) -> int:
    return sum(xs)
