"""Contract of every method, including those of installed plug-ins (`pytest -k NAME` for one of them)."""

from __future__ import annotations

import copy
from dataclasses import fields

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from fastssl.errors import ConfigError
from fastssl.methods import METHODS, MethodConfig, TrainProgress
from fastssl.methods.queue_method import MomentumConfig
from fastssl.methods.shared_options import EMAConfig, HeadConfig, QueueConfig
from fastssl_pipelines.batch import Batch
from fastssl_pipelines.views import ViewSpec
from tests.fastssl.small_methods import (
    BATCH,
    LR,
    MOMENTUM,
    QUEUE,
    STEPS_PER_EPOCH,
    TOTAL_STEPS,
    VARIANTS,
    SmallEncoder,
    a_batch,
    a_step,
    build,
    follow,
    one_loss,
    sgd,
    sizes,
)
from tests.fastssl.transcriptions import STEPS, rows


def test_a_configuration_has_only_the_options_of_its_parts():
    """In the order of config.json."""
    common = [field.name for field in fields(MethodConfig)]
    for part, options in (
        (QueueConfig, ["queue_size"]),
        (EMAConfig, ["momentum"]),
        (HeadConfig, ["head", "hidden_dim"]),
        (MomentumConfig, ["queue_size", "momentum", "head", "hidden_dim", "shuffle", "shard_queue"]),
    ):
        assert [field.name for field in fields(part)] == common + options


def test_every_method_of_this_package_has_a_transcription():
    assert {name for name, cls in METHODS.items() if cls.__module__.startswith("fastssl.")} == STEPS.keys()


@pytest.mark.parametrize("norm", ["local", "split"])
@pytest.mark.parametrize("variant", [variant for variant, (name, _) in VARIANTS.items() if name in STEPS])
def test_one_step_equals_a_plain_transcription(variant, norm):
    name, options = VARIANTS[variant]
    method, batch = build(name, norm, **options), a_batch(name)
    twin = copy.deepcopy(method)
    output, gradient = a_step(method, sgd(method), batch)

    torch.manual_seed(batch.step)
    loss, state = STEPS[name](twin, batch)
    loss.backward()
    expected_gradient = twin.encoder().conv1.weight.grad.clone()
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.grad is not None:
                parameter -= LR * parameter.grad
        follow(twin.key_encoder, twin.query_encoder, MOMENTUM)
        if name == "msvq":
            follow(twin.second_key_encoder, twin.query_encoder, twin.config.second_momentum)
        if name == "smog":
            state["group_momentum"] = torch.tensor(1 - 0.01 * (batch.step + 1) / TOTAL_STEPS)
        expected = {**twin.state_dict(), **state}

    assert output.loss.item() == pytest.approx(loss.item(), rel=2e-6)
    assert (gradient - expected_gradient).norm() <= 2e-5 * expected_gradient.norm()
    assert expected_gradient.norm() > 0
    assert method.state_dict().keys() == expected.keys()
    for entry, got in method.state_dict().items():
        torch.testing.assert_close(
            got, expected[entry], rtol=1e-5, atol=2e-6, msg=lambda text, at=entry: f"{at}: {text}"
        )


@pytest.mark.parametrize("name", ["mocov1", "mocov2", "unimoco", "supcon", "co2", "unmix"])
def test_contrast_accuracy_is_the_share_of_rows_whose_own_key_wins(name):
    method, batch = build(name, "local", shuffle=False), a_batch(name)
    with torch.no_grad():
        query, key = rows(method.query_encoder, batch.views[0]), rows(method.key_encoder, batch.views[1])
        method.queue.keys[0] = normalize(key[:2].sum(0), dim=0)  # Nearer to some queries than their own keys
        expected = ((query * key).sum(1) > (query @ method.queue.keys.T).amax(1)).float().mean()
    accuracy = method(batch).metrics["contrast_accuracy"]
    assert accuracy == expected
    assert 0 < expected < 1
    assert not accuracy.requires_grad


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_state_dict_is_the_complete_state(variant):
    """Across the end of an epoch, after which SMoG makes new groups."""
    name, options = VARIANTS[variant]
    method = build(name, **options)
    optimizer = sgd(method)
    for step in range(6):
        a_step(method, optimizer, a_batch(name, step))
    twin = build(name, **options)
    twin.load_state_dict(copy.deepcopy(method.state_dict()))
    ours, _ = a_step(method, optimizer, a_batch(name, 6))
    theirs, _ = a_step(twin, sgd(twin), a_batch(name, 6))
    assert torch.equal(ours.loss, theirs.loss)
    assert all(torch.equal(a, b) for a, b in zip(method.state_dict().values(), twin.state_dict().values(), strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_changes_no_state_except_that_of_batch_norm(variant):
    name, options = VARIANTS[variant]
    method = build(name, **options)
    norms = ("running_mean", "running_var", "num_batches_tracked")
    before = {entry: value.clone() for entry, value in method.state_dict().items() if not entry.endswith(norms)}
    torch.manual_seed(5)
    first = method(a_batch(name)).loss
    after = method.state_dict()
    assert [entry for entry, value in before.items() if not torch.equal(value, after[entry])] == []
    torch.manual_seed(5)
    # In training batch norm does not read its running statistics, so a second forward gives the same
    assert torch.equal(method(a_batch(name)).loss, first)


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_goes_down_on_64_images(name):
    method, batch, losses = build(name), a_batch(name, 0, count=64), []
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=LR, momentum=0.9)
    for _ in range(60):
        torch.manual_seed(0)
        output = method(batch)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses[-1] < 0.9 * losses[0]  # With soft targets it converges to their entropy, not to 0


# Variants whose graphs consist of parts that other variants compile
SAME_PARTS = {"unimoco symmetric", "unmix symmetric", "mocov2 head with batch norm", "co2 alone"}


@pytest.mark.slow
@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant not in SAME_PARTS])
def test_forward_compiles_without_a_graph_break(variant):
    name, options = VARIANTS[variant]
    method, twin = build(name, **options), build(name, **options)
    torch.manual_seed(5)
    expected = method(a_batch(name))
    torch.manual_seed(5)
    torch.compiler.reset()
    compiled = torch.compile(twin, fullgraph=True, dynamic=False, backend="aot_eager")
    got = compiled(a_batch(name))
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=0)
    got.loss.backward()
    expected.loss.backward()
    gradient, wanted = twin.encoder().conv1.weight.grad, method.encoder().conv1.weight.grad
    assert (gradient - wanted).norm() <= 1e-5 * wanted.norm()
    twin.after_step(got, TrainProgress(3, TOTAL_STEPS, STEPS_PER_EPOCH))
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(a_batch(name, 4))


@pytest.mark.parametrize("name", ["unimoco", "supcon"])
def test_without_labels_the_step_is_mocos(name):
    method, moco_v2, batch = build(name), build("mocov2"), a_batch(name)
    batch.labels.fill_(-1)
    (ours, gradient), (theirs, expected) = (a_step(each, sgd(each), batch) for each in (method, moco_v2))
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=0)
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()
    slots = (batch.step * BATCH + torch.arange(BATCH)) % QUEUE
    assert (method.queue.labels[slots] == -1).all()
    assert method.state_dict()["queue.labels"].dtype == torch.int64


def test_co2_without_its_term_is_moco():
    (ours, gradient), (theirs, expected) = one_loss("co2", consistency_weight=0.0), one_loss("mocov2")
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()


def test_co2_with_the_positive_is_another_loss():
    assert one_loss("co2", include_positive=True)[0] != one_loss("co2")[0]


def test_mixco_without_its_term_is_moco_on_a_batch_with_mixed_images():
    (one, _), (two, _) = one_loss("mixco", mix_weight=0.0), one_loss("mixco", mix_weight=1.0)
    assert one < two


def test_msvq_with_equal_teachers_queues_and_views_is_ressl():
    both = {"shuffle": False, "hidden_dim": 20, "teacher_temperature": 0.05}
    msvq, ressl, view = build("msvq", **both), build("ressl", **both), a_batch("ressl").views
    msvq.second_queue.load_state_dict(msvq.queue.state_dict())
    msvq.second_key_encoder.load_state_dict(msvq.key_encoder.state_dict())
    ressl.load_state_dict({name: msvq.state_dict()[name] for name in ressl.state_dict()})
    batch = a_batch("ressl")
    four = Batch(views=(view[0], view[1], view[1], view[1]), labels=batch.labels, ids=batch.ids, step=batch.step)
    torch.testing.assert_close(msvq(four).loss, ressl(batch).loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_everything_but_momentum_encoders_is_trained_and_the_encoder_is_part_of_it(name):
    method = build(name)
    trained = {entry for entry, parameter in method.named_parameters() if parameter.requires_grad}
    followers = ("key_encoder.", "second_key_encoder.")
    assert trained == {entry for entry, _ in method.named_parameters() if not entry.startswith(followers)}
    exported = {id(parameter) for parameter in method.encoder().parameters()}
    assert exported <= {id(parameter) for parameter in method.parameters() if parameter.requires_grad}


def test_the_exported_encoder_is_that_of_the_queries():
    for name in STEPS:
        method = build(name)
        assert method.encoder() is method.query_encoder[0]


def test_heads_are_those_of_the_papers():
    def kinds(name):
        return [type(layer) for layer in build(name).query_encoder[1]]

    assert isinstance(build("mocov1").query_encoder[1], nn.Linear)
    for name in ("mocov2", "unimoco", "supcon", "mixco", "unmix", "co2", "ressl", "msvq"):
        assert kinds(name) == [nn.Linear, nn.ReLU, nn.Linear]
    norm = nn.BatchNorm1d
    assert kinds("smog") == [nn.Linear, norm, nn.ReLU, nn.Linear, norm]
    assert not build("smog").query_encoder[1][-1].affine
    assert [type(layer) for layer in build("smog").predictor] == [nn.Linear, norm, nn.ReLU, nn.Linear]
    encoder = SmallEncoder(nn.BatchNorm2d)
    widths = {"mocov2": 20, "ressl": 4096, "msvq": 2048, "smog": 2048}
    for name, width in widths.items():
        options = {"groups": 6, "bank_size": 6} if name == "smog" else {"queue_size": 8}
        views = tuple(ViewSpec(size=size) for size in sizes(name))
        method = METHODS[name](copy.deepcopy(encoder), METHODS[name].Config(**options), views)
        assert method.query_encoder[1][0].out_features == width
        assert (
            method.query_encoder[1][-1].weight is None or method.query_encoder[1][-1].out_features == method.config.dim
        )


@pytest.mark.parametrize("name", METHODS)
def test_a_view_list_that_does_not_fit_is_refused(name):
    views = (ViewSpec(size=16),) * 3
    with pytest.raises(ConfigError, match=r"(3 views|views of \[16, 16, 16\] pixels) were given to"):
        METHODS[name].check_views(views)


@pytest.mark.parametrize(
    ("name", "options", "batch_size", "sentence"),
    [
        (
            "mocov2",
            {"queue_size": 15},
            16,
            "--method.queue-size 15 .*--train.batch-size 16; .* hold the 16",
        ),
        ("mocov2", {"queue_size": 31, "symmetric": True}, 16, "must hold the 32 keys"),
        ("msvq", {"queue_size": 15}, 16, "--method.queue-size 15"),
        ("smog", {"bank_size": 15, "groups": 5}, 16, "--method.bank-size 15 .*--train.batch-size 16"),
        ("mixco", {}, 15, "--train.batch-size 15 was given with mixco, which mixes .* in pairs"),
        ("unmix", {}, 15, "--train.batch-size 15 was given with unmix"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(name, options, batch_size, sentence):
    with pytest.raises(ConfigError, match=sentence):
        METHODS[name].Config(**options).check_batch(batch_size)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("mocov2", {"temperature": 0}, "--method.temperature 0 was given; it must be at least 0.001 and at most 1000"),
        ("mocov2", {"hidden_dim": 0}, "--method.hidden-dim 0"),
        ("co2", {"consistency_weight": -1}, "--method.consistency-weight -1"),
        ("co2", {"consistency_temperature": 0}, "--method.consistency-temperature 0"),
        ("mixco", {"mix_temperature": 0}, "--method.mix-temperature 0"),
        ("mixco", {"mix_weight": -1}, "--method.mix-weight -1"),
        ("unmix", {"global_probability": 1.5}, "--method.global-probability 1.5"),
        ("ressl", {"teacher_temperature": 0}, "--method.teacher-temperature 0"),
        ("msvq", {"second_momentum": 2}, "--method.second-momentum 2"),
        ("smog", {"groups": 0}, "--method.groups 0"),
        ("smog", {"group_momentum": 1.5}, "--method.group-momentum 1.5"),
        (
            "smog",
            {"groups": 10, "bank_size": 9},
            "--method.bank-size 9 .* at least --method.groups 10",
        ),
    ],
)
def test_an_option_out_of_its_range_is_refused(name, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        METHODS[name].Config(**options)
