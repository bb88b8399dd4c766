"""What is packed comes out again, as views of one copy."""

import numpy as np
import torch

from services.llm.packing import pack, unpack, upload, upload_tensor

CPU = torch.device("cpu")
ARRAYS = [
    np.arange(5),
    np.arange(12).reshape(3, 4)[:, ::2],
    np.zeros((0, 7), np.int64),
    np.array([[2**40]]),
]


def test_arrays_of_any_shape_come_out_as_they_went_in() -> None:
    found = upload(ARRAYS, CPU)
    assert [tensor.dtype for tensor in found] == [torch.int64] * len(ARRAYS)
    for tensor, array in zip(found, ARRAYS, strict=True):
        assert tensor.shape == array.shape and (tensor.numpy() == array).all()


def test_what_is_unpacked_follows_the_buffer() -> None:
    packed = pack(ARRAYS[:2], CPU)
    first, second = unpack(packed, [(5,), (3, 2)])
    packed += 1
    assert first.tolist() == [1, 2, 3, 4, 5] and second[2].tolist() == [9, 11]


def test_a_tensor_that_is_there_is_not_copied() -> None:
    tensor = torch.ones(3)
    assert upload_tensor(tensor, CPU) is tensor
