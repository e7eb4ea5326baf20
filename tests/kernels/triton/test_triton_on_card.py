"""Launches with tensors of the host give on a device what they give here: the device is other memory of the host's."""

from __future__ import annotations

import pytest
import torch
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from on_card import Luggage, on_card
from penstock.kernels import ops as op_table

HERE = torch.device("cpu")


def test_arguments_keep_their_shape_and_what_they_share() -> None:
    memory = torch.arange(40, dtype=torch.int32)
    table, codes = memory[4:28].view(4, 6).T, memory[8:].view(torch.int8)
    luggage = Luggage(HERE)
    moved_table, moved_codes, number = luggage.taken(table), luggage.taken(codes), luggage.taken(7)
    descriptor = luggage.taken(TensorDescriptor.from_tensor(memory.view(2, 20)[:, :16], [2, 16]))
    assert torch.equal(moved_table, table)
    assert moved_table.stride() == table.stride()
    assert (moved_codes.dtype, number) == (torch.int8, 7)
    assert moved_table.untyped_storage().data_ptr() == moved_codes.untyped_storage().data_ptr()
    assert descriptor.base.untyped_storage().data_ptr() == moved_codes.untyped_storage().data_ptr()
    assert moved_table.untyped_storage().data_ptr() != memory.untyped_storage().data_ptr()
    moved_table[0, 0] = -1
    assert memory[4] == 4
    luggage.bring_back()
    assert memory[4] == -1
    assert memory[3] == 3


def test_ops_compute_on_the_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = op_table.load("triton", 1)
    x, residual, weight = torch.randn(3, 48), torch.randn(3, 48), torch.rand(48)
    expected_residual = residual.clone()
    expected = ops.rms_norm(x, expected_residual, weight, 1e-5)
    own = {each.untyped_storage().data_ptr() for each in (x, residual, weight)}
    launches = []

    def launch(executor: interpreter.GridExecutor, *args: object, **kwargs: object) -> None:
        tensors = [each for each in args if isinstance(each, torch.Tensor)]
        launches.append(own & {each.untyped_storage().data_ptr() for each in tensors})
        original(executor, *args, **kwargs)

    original = interpreter.GridExecutor.__call__
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", on_card(launch, HERE))
    assert torch.equal(ops.rms_norm(x, residual, weight, 1e-5), expected)
    assert torch.equal(residual, expected_residual)
    assert launches == [set()]
