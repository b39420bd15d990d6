"""The module that holds a node's parameters: letters, assignment, and what it shares with nobody."""

import copy

import pytest
import torch

import reftheads as rh
from reftheads.graph import Context, Shape
from reftheads.runtime.node_module import NodeModule


def test_the_papers_letters_are_the_parameters():
    node = NodeModule(rh.LoReFT(rank=3), Shape(8))
    assert (node.R.shape, node.W.shape, node.b.shape) == ((3, 8), (3, 8), (3,))
    torch.testing.assert_close(node.R @ node.R.T, torch.eye(3), atol=1e-6, rtol=0)
    assert not node.R.requires_grad and node.W.requires_grad
    with pytest.raises(AttributeError, match="Q"):
        _ = node.Q


def test_assign_sets_what_the_letters_then_read():
    node = NodeModule(rh.LoReFT(rank=2), Shape(6))
    r = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(0)))[0].T
    node.assign(R=r, W=torch.ones(2, 6), b=[1.0, 2.0])
    torch.testing.assert_close(node.R, r, atol=1e-6, rtol=0)
    assert node.W.tolist() == [[1.0] * 6] * 2 and node.b.tolist() == [1.0, 2.0]


def test_assign_refuses_and_changes_nothing():
    node = NodeModule(rh.LoReFT(rank=2), Shape(6))
    before = copy.deepcopy(node.state_dict())
    with pytest.raises(ValueError, match="LoReFT has no parameter 'Q': it has M, W, b"):
        node.assign(Q=torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"W must have shape \(2, 6\), got \(6, 2\)"):
        node.assign(W=torch.zeros(6, 2))
    with pytest.raises(ValueError, match="R of a LoReFT needs orthonormal rows"):
        node.assign(R=torch.ones(2, 6))
    with pytest.raises(ValueError, match="has no parameter 'Q'"):
        node.assign(b=torch.ones(2), Q=torch.zeros(1))
    for name, value in node.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_given_vectors_are_saved_but_not_trained():
    given = NodeModule(rh.Steering(vector=torch.arange(4.0)), Shape(4))
    assert list(given.parameters()) == [] and given.v.tolist() == [0, 1, 2, 3]
    assert list(given.state_dict()) == ["v"]
    assert [n for n, _ in NodeModule(rh.Steering(torch.ones(4), trainable=True), Shape(4)).named_parameters()] == ["v"]


def test_modules_made_from_one_constant_share_nothing_with_it_or_each_other():
    for intervention in (
        rh.Steering(torch.ones(4), trainable=True),
        rh.Steering(torch.ones(4)),
        rh.Replace(torch.ones(4)),
    ):
        first, second = NodeModule(intervention, Shape(4)), NodeModule(intervention, Shape(4))
        with torch.no_grad():
            for tensor in first.stored().values():
                tensor.zero_()
        assert all(tensor.tolist() == [1] * 4 for tensor in second.stored().values())
        assert all(constant.value.tolist() == [1] * 4 for constant in intervention.constants())


def test_a_module_derives_alone_what_it_is_not_given():
    node, h = NodeModule(rh.LoReFT(rank=2), Shape(6)), torch.randn(1, 3, 6)
    stored = node.stored()
    with_r = node({**stored, **node.intervention.derive(stored)}, h, Context())
    assert torch.equal(node(None, h, Context()), with_r)
    assert torch.allclose(with_r, h + (h @ node.W.T + node.b - h @ node.R.T) @ node.R, atol=1e-6)
