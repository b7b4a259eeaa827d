"""Stacked layers round as the operators of the plain engine do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from cape.convergence import layers
from cape.convergence.draws import draws_for
from cape.convergence.layers import BatchNorm
from cape.convergence.stack import loss_gradients, stacked_losses
from cape.native import native_module
from cape.tasks import Loss


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("batch", "channels"), [(32, 48), (33, 16), (7, 128), (8, 130), (2, 32)])
def test_batch_norm_is_torchs_bit_for_bit(batch: int, channels: int, affine: bool, threads: int) -> None:
    torch.manual_seed(0)
    modules = [nn.BatchNorm1d(channels, affine=affine) for _ in range(3)]
    stacked = BatchNorm(modules[0], 3)
    for slot, module in enumerate(modules):
        for parameter, values in zip(stacked.parameters, module.parameters(), strict=True):
            nn.init.normal_(values)
            parameter.load(slot, values.detach())
    x, grad = torch.randn(2, 3, batch, channels)
    with torch.no_grad():
        y = stacked.forward(x, draws_for(x.device, 3))
        passed = stacked.backward(grad, needs_input=True)
    for slot, module in enumerate(modules):
        leaf = x[slot].clone().requires_grad_()
        expected = module(leaf)
        expected.backward(grad[slot])
        assert torch.equal(y[slot], expected) and passed is not None and torch.equal(passed[slot], leaf.grad)
        for parameter, values in zip(stacked.parameters, module.parameters(), strict=True):
            assert torch.equal(parameter.grad[slot], values.grad)


def test_batch_norms_of_other_shapes_are_refused_and_of_other_strides_read() -> None:
    native_module()
    forward, backward = torch.ops.cape.stacked_batch_norm, torch.ops.cape.stacked_batch_norm_backward
    x, rows, small = torch.randn(3, 4, 5), torch.randn(3, 5), torch.zeros(1, 1)
    turned = rows.t().contiguous().t()
    for ours, expected in (
        (forward(x, turned, turned, 1e-5), forward(x, rows, rows, 1e-5)),
        (backward(x, x, turned, turned, turned), backward(x, x, rows, rows, rows)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    for op, args, what in (
        (forward, (x, small, rows, 1e-5), "weight"),
        (forward, (x, rows, small, 1e-5), "bias"),
        (forward, (x, rows, rows.double(), 1e-5), "bias"),
        (backward, (x[:1], x, None, rows, rows), "grad"),
        (backward, (x, x, None, small, rows), "mean"),
        (backward, (x, x, None, rows, rows.double()), "inverse"),
    ):
        with pytest.raises(RuntimeError, match=f"cape: stacked_batch_norm.*: {what} must"):
            op(*args)


def test_opcheck() -> None:
    native_module()
    x, rows = torch.randn(3, 4, 5), torch.randn(3, 5)
    torch.library.opcheck(torch.ops.cape.stacked_batch_norm, (x, rows, rows, 1e-5))
    torch.library.opcheck(torch.ops.cape.stacked_batch_norm, (x, None, None, 1e-5))
    torch.library.opcheck(torch.ops.cape.stacked_batch_norm_backward, (x, x, rows, rows, rows))
    torch.library.opcheck(torch.ops.cape.stacked_batch_norm_backward, (x, x, None, rows, rows))


def test_the_native_batch_norm_serves_the_families_own_widths() -> None:
    if not layers._norms_agree(torch.get_num_threads()):
        pytest.skip("torch rounds otherwise here, or the extension is not built")
    for width in (128, 256, 512, 1024):
        assert layers._native_norm(torch.zeros(2, 32, width))
    assert not layers._native_norm(torch.zeros(2, 32, 130))
    assert not layers._native_norm(torch.zeros(2, torch.get_num_threads(), 128))


@pytest.mark.parametrize("batch", [32, 7])
def test_cross_entropy_without_a_graph_is_autograds_bit_for_bit(batch: int) -> None:
    torch.manual_seed(0)
    outputs, targets = 3.0 * torch.randn(3, batch, 10), torch.randint(0, 10, (3, batch))
    targets[1, 2] = -100  # a sample without a label
    criterion = Loss("cross_entropy")
    losses, grad = loss_gradients(criterion, outputs, targets)
    leaf = outputs.clone().requires_grad_()
    expected = stacked_losses(criterion, leaf, targets)
    assert torch.equal(losses, expected)
    assert torch.equal(grad, torch.autograd.grad(expected.sum(), leaf)[0])
