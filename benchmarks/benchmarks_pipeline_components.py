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


@dsl.component(base_image="python:3.11")
def kfp_table(mib: int, out: dsl.Output[dsl.Dataset]):
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    pq.write_table(pa.table({f"c{i}": rng.random(size=mib * 2**20 // 80) for i in range(10)}), out.path)


@dsl.component(base_image="python:3.11")
def kfp_consume(data: dsl.Input[dsl.Dataset]) -> int:
    import pyarrow.parquet as pq

    return pq.read_table(data.path).num_rows
