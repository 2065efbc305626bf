"""When passes are recorded as CUDA graphs; that they compute the same is in tests/gpu/test_cuda_graphs.py."""

import pytest
import torch

from tessera.training.cuda_graphs import GraphedPasses, choose_graphs

CUDA = torch.device("cuda")


def test_a_gpu_measures_before_it_records():
    choice = choose_graphs("auto", CUDA, {"several processes": False})
    assert choice.on and choice.measured
    assert not choose_graphs("on", CUDA, {}).measured


def test_the_first_obstacle_is_named():
    obstacles = {"experts": False, "several processes": True}
    assert str(choose_graphs("auto", CUDA, obstacles)) == "no CUDA graphs (not with several processes)"
    with pytest.raises(ValueError, match="cuda_graphs=on: not with several processes; take"):
        choose_graphs("on", CUDA, obstacles)
    with pytest.raises(ValueError, match="CPU has none"):
        choose_graphs("on", torch.device("cpu"), {})
    assert not choose_graphs("off", CUDA, {}).on


def test_a_shape_that_was_not_recorded_is_run():
    weight = torch.nn.Parameter(torch.tensor([2.0]))

    def run(batch, counted):
        loss = (weight * batch["x"]).sum() / counted
        loss.backward()
        return loss.detach()

    passes = GraphedPasses(run, [weight])
    passes.begin()
    loss = sum(passes({"x": torch.tensor([x])}, torch.tensor(2)) for x in (3.0, 5.0))
    assert loss == 8 and weight.grad == 4
