"""When a network is recorded and when it is played; what is played needs a GPU (tests/gpu)."""

import contextlib

import pytest
import torch
from torch import nn

from convnext_cli.training.graphs import record_network


@pytest.fixture
def recorded(monkeypatch):
    """Graphs that were recorded; playing them does nothing."""
    graphs = []

    @contextlib.contextmanager
    def record(graph, *, pool, capture_error_mode):
        assert (pool, capture_error_mode) == ("pool", "thread_local")
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_cache_enabled()
        graphs.append(graph)
        yield

    class Graph:
        plays = 0

        def replay(self):
            self.plays += 1

    class Stream:
        def __init__(self, _device):
            pass

        def wait_stream(self, _other):
            pass

    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda _: torch.get_rng_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, _: torch.set_rng_state(state))
    return graphs


def learn(network, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = network(x)
    network.zero_grad()  # between the two passes, as Lightning does
    out.float().sum().backward()
    return out


def test_a_network_is_recorded_once_for_each_size_it_learns_from(recorded):
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    record_network(network)
    small, large = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 16, 16)

    for x in (small, large, small):
        learn(network, x)

    assert [graph.plays for graph in recorded] == [2, 2, 1, 1]


def test_gradients_reach_the_weights_and_nothing_is_played_where_nothing_learns(recorded):
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    record_network(network)
    x = torch.randn(2, 3, 2, 2)

    with torch.no_grad():
        network(x)
    network.eval()
    network(x)
    assert recorded == []
    network.train()
    learn(network, x)

    assert len(recorded) == 2
    assert all(weight.grad is not None for weight in network.parameters())


def test_recording_leaves_what_is_drawn_as_it_was(recorded):
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 2))
    record_network(network)

    torch.manual_seed(3)
    learn(network, torch.zeros(2, 3, 2, 2))
    drawn = torch.rand(4)

    assert len(recorded) == 2
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(4))


@pytest.mark.parametrize("passes", [1, 2])
def test_gradients_of_several_passes_have_a_place_of_their_own(recorded, passes):
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    record_network(network, passes=passes)

    learn(network, torch.ones(2, 3, 2, 2))
    first = network[1].weight.grad
    learn(network, torch.ones(2, 3, 2, 2))

    assert len(recorded) == 2
    at_the_same_place = network[1].weight.grad.data_ptr() == first.data_ptr()
    assert at_the_same_place == (passes == 1)
