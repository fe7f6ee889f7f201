"""Contract of every method: one step against a plain transcription of the official code, and its state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from fastssl.methods import METHODS
from fastssl.models.encoders import build_encoder
from fastssl.models.norm import norm_layer
from fastssl_pipelines.batch import Batch
from fastssl_pipelines.views import ViewSpec

BATCH, DIM, QUEUE, MOMENTUM, TEMPERATURE = 16, 24, 40, 0.9, 0.15


def build(name: str, norm: str = "split", **options) -> nn.Module:
    torch.manual_seed(7)
    encoder = build_encoder("resnet18", width=0.0625, stem="small", norm_layer=norm_layer(norm, 4))
    config = METHODS[name].Config(dim=DIM, queue_size=QUEUE, momentum=MOMENTUM, temperature=TEMPERATURE, **options)
    method = METHODS[name](encoder, config, (ViewSpec(size=16),) * METHODS[name].number_of_views)
    # queue entries with labels, and key weights that differ from the query's, as in the middle of a run
    method.queue.labels.copy_(torch.arange(QUEUE) % 5 - 1)
    for parameter in method.key_encoder.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return method


def a_batch(step: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(step)
    views = tuple(torch.randn(BATCH, 3, 16, 16, generator=generator) for _ in range(2))
    labels = torch.randint(-1, 4, (BATCH,), generator=generator)
    return Batch(views=views, labels=labels, ids=torch.arange(BATCH), step=step)


def official_loss(name, query, key, queue, labels, queue_labels):
    """moco/builder.py and unimoco/losses.py, with their dense logits and targets."""
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], dim=1) / TEMPERATURE
    if name != "unimoco":
        return nn.functional.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))
    same = (labels[:, None] == queue_labels[None]) & (labels[:, None] != -1)
    target = torch.cat([torch.ones(len(query), 1), same.float()], dim=1)
    sum_neg = ((1 - target) * logits.exp()).sum(1)
    sum_pos = (target * (-logits).exp()).sum(1)
    return torch.log(1 + sum_neg * sum_pos).mean()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("norm", ["local", "split"])
def test_one_step_equals_a_plain_transcription(name, norm):
    method, batch, lr = build(name, norm), a_batch(), 0.05
    ours = copy.deepcopy(method)
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=lr)
    torch.manual_seed(11)
    output = ours(batch)
    output.loss.backward()
    optimizer.step()
    ours.after_step(output, batch.step)

    query_encoder, key_encoder = method.query_encoder, method.key_encoder
    torch.manual_seed(11)
    query = normalize(query_encoder(batch.views[0]), dim=1)
    with torch.no_grad():
        order = torch.randperm(BATCH)
        shuffled = key_encoder(batch.views[1][order])
        key = normalize(shuffled[torch.argsort(order)], dim=1)
    queue = method.queue.keys.clone()
    loss = official_loss(name, query, key, queue, batch.labels, method.queue.labels)
    loss.backward()
    first_gradient = query_encoder[0].conv1.weight.grad.clone()
    with torch.no_grad():
        for q, k in zip(query_encoder.parameters(), key_encoder.parameters(), strict=True):
            q -= lr * q.grad
            k.mul_(MOMENTUM).add_(q, alpha=1 - MOMENTUM)
        slots = (batch.step * BATCH + torch.arange(BATCH)) % QUEUE
        queue[slots] = key

    torch.testing.assert_close(output.loss, loss, rtol=2e-6, atol=0)
    gradient = ours.query_encoder[0].conv1.weight.grad
    assert (gradient - first_gradient).norm() <= 2e-5 * first_gradient.norm()
    torch.testing.assert_close(ours.queue.keys, queue, rtol=1e-6, atol=1e-7)
    assert torch.equal(ours.queue.labels[slots], batch.labels)
    for (parameter_name, got), expected in zip(
        ours.key_encoder.named_parameters(), key_encoder.parameters(), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, msg=parameter_name)


@pytest.mark.parametrize("name", METHODS)
def test_contrast_accuracy_is_the_share_of_rows_whose_own_key_wins(name):
    method, batch = build(name, shuffle=False), a_batch()
    accuracy = method(batch).metrics["contrast_accuracy"]
    twin = build(name, shuffle=False)
    with torch.no_grad():
        query = normalize(twin.query_encoder(batch.views[0]), dim=1)
        key = normalize(twin.key_encoder(batch.views[1]), dim=1)
        own = (query * key).sum(1)
        expected = (own > (query @ twin.queue.keys.T).amax(1)).float().mean()
    assert accuracy == expected
    assert not accuracy.requires_grad


def step(method, optimizer, number):
    torch.manual_seed(number)
    output = method(a_batch(number))
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    method.after_step(output, number)
    return output.loss.detach()


@pytest.mark.parametrize("name", METHODS)
def test_the_state_dict_is_the_whole_truth(name):
    method = build(name)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.05)
    for number in range(3):
        step(method, optimizer, number)
    twin = build(name)
    twin.load_state_dict(copy.deepcopy(method.state_dict()))
    twin_optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.05)
    assert torch.equal(step(method, optimizer, 3), step(twin, twin_optimizer, 3))
    assert all(torch.equal(a, b) for a, b in zip(method.state_dict().values(), twin.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_goes_down_on_one_batch(name):
    method = build(name)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    batch, losses = a_batch(0), []
    for _ in range(60):
        output = method(batch)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", METHODS)
def test_forward_compiles_without_a_graph_break(name):
    method = build(name)
    torch.manual_seed(5)
    expected = method(a_batch()).loss
    twin = build(name)
    torch.manual_seed(5)
    got = torch.compile(twin, fullgraph=True, backend="aot_eager")(a_batch())
    torch.testing.assert_close(got.loss, expected, rtol=1e-6, atol=0)
    got.loss.backward()
    assert twin.query_encoder[0].conv1.weight.grad.abs().sum() > 0


def test_only_the_query_encoder_learns_and_it_is_what_is_exported():
    method = build("mocov2")
    learning = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert learning == {name for name, _ in method.named_parameters() if name.startswith("query_encoder.")}
    assert method.encoder() is method.query_encoder[0]
    assert method.encoder()(torch.randn(4, 3, 16, 16)).shape == (4, method.encoder().feature_dim)


def test_heads_are_those_of_the_papers():
    assert isinstance(build("mocov1").query_encoder[1], nn.Linear)
    kinds = [type(layer) for layer in build("mocov2").query_encoder[1]]
    assert kinds == [nn.Linear, nn.ReLU, nn.Linear]


def test_a_wrong_number_of_views_is_refused():
    encoder = build_encoder("resnet18", width=0.0625, stem="small")
    with pytest.raises(ValueError, match="3 views were given to mocov2, which takes 2"):
        METHODS["mocov2"](encoder, METHODS["mocov2"].Config(), (ViewSpec(size=16),) * 3)
