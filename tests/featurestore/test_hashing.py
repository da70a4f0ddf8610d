"""Hashes are the same in Python and in the kernels; HyperLogLog counts within its error."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from mlfuncs_featurestore import hash_kernels
from mlfuncs_featurestore.hashing import hash_array, hash_bytes, hash_entities, hash_entity, hash_int
from mlfuncs_featurestore.hyperloglog import add_hash, empty_registers, estimate

INT64 = st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(INT64, st.text(), st.binary()), min_size=1))
def test_a_hash_is_the_same_in_python_and_in_the_kernel(rows):
    ints, texts, blobs = (list(column) for column in zip(*rows, strict=True))
    columns = [pa.array(ints, pa.int64()), pa.array(texts, pa.string()), pa.array(blobs, pa.binary())]
    assert hash_array(columns[0]).tolist() == [hash_int(value) for value in ints]
    assert hash_array(columns[1]).tolist() == [hash_bytes(value.encode()) for value in texts]
    assert hash_array(columns[2]).tolist() == [hash_bytes(value) for value in blobs]
    expected = [hash_entity({"a": a, "b": b, "c": c}) for a, b, c in rows]
    assert hash_entities(columns).tolist() == expected
    assert hash_entities([column.slice(1) for column in columns]).tolist() == expected[1:]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1)))
def test_registers_are_the_same_in_python_and_in_the_kernel(hashes):
    slow, fast = empty_registers(), np.zeros(4096, np.uint8)
    for one in hashes:
        add_hash(slow, one)
    hash_kernels.hll_add(fast, np.array(hashes, np.uint64))
    assert bytes(slow) == fast.tobytes()


def test_the_estimate_is_within_five_percent():
    for count in (100, 5_000, 200_000):
        registers = np.zeros(4096, np.uint8)
        hash_kernels.hll_add(registers, hash_kernels.hash_ints(np.arange(count, dtype=np.int64)))
        assert abs(estimate(registers.tolist()) / count - 1) < 0.05
