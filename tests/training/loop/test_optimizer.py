"""Muon against its definition."""

import torch

from training.loop.optimizer import Muon, orthogonalized


def test_orthogonalized_matrices_have_like_singular_values():
    for shape in ((3, 16, 40), (3, 40, 16)):
        values = torch.linalg.svdvals(orthogonalized(torch.randn(shape)).float())
        assert values.min() > 0.3
        assert values.max() < 1.5


def test_muon_moves_each_matrix_as_if_it_were_alone():
    """Matrices of one shape are stepped together."""
    start, gradients = torch.randn(2, 8, 6), torch.randn(2, 8, 6)
    together = [torch.nn.Parameter(x.clone()) for x in start]
    alone = [torch.nn.Parameter(x.clone()) for x in start]
    for group in (together, alone):
        for parameter, gradient in zip(group, gradients):
            parameter.grad = gradient.clone()
    Muon(together, 0.1).step()
    for parameter in alone:
        Muon([parameter], 0.1).step()
    for one, other in zip(together, alone):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
        assert not torch.equal(one, start[0])
