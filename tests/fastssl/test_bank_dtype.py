"""Banks that are only read may hold 16 bits: queues of all methods, batch keys beside them, groups without gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from fastssl.methods import METHODS, Clock
from fastssl.models.kmeans import spherical_kmeans
from fastssl.models.queue import KeyQueue
from fastssl_kernels import assign_groups
from tests.fastssl.small_methods import BATCH, a_batch, a_step, build, sgd

HALVES = (torch.bfloat16, torch.float16)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def unit_rows(count, dim=8, seed=0):
    return normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_queue_draws_the_same_keys_in_every_dtype_and_rounds_what_it_takes(dtype):
    exact, rounded = (KeyQueue(50, 8, torch.Generator().manual_seed(3), dtype=each) for each in (torch.float32, dtype))
    for queue in (exact, rounded):
        queue.enqueue(unit_rows(20), torch.arange(20), 1)
    assert rounded.keys.dtype == dtype
    assert torch.equal(rounded.keys, exact.keys.to(dtype))
    assert torch.equal(rounded.labels, exact.labels)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_the_hash_of_a_queue_sees_one_bit_of_any_key(dtype):
    queue = KeyQueue(12, 4, torch.Generator().manual_seed(3), dtype=dtype)
    before, bits = queue.checksum(), queue.keys.view({2: torch.int16, 4: torch.int32}[dtype.itemsize])
    for row, column in ((0, 0), (7, 2), (11, 3)):
        bits[row, column] ^= 1
        assert queue.checksum() != before
        bits[row, column] ^= 1
    assert queue.checksum() == before


def test_the_hash_of_a_float32_queue_is_what_it_was():
    queue = KeyQueue(12, 4, torch.Generator().manual_seed(3))
    queue.enqueue(torch.eye(4), torch.arange(4), 2)
    assert queue.checksum().item() == 209357770061426036


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [5, 12, 13, 40])
def test_a_step_on_the_device_writes_where_the_same_int_does(size, dtype):
    by_int, by_tensor = (KeyQueue(size, 4, torch.Generator().manual_seed(1), dtype=dtype) for _ in range(2))
    for number in [*range(20), 10**9]:
        keys, labels = unit_rows(5, 4, number), torch.arange(5) + number if number % 2 else None
        by_int.enqueue(keys, labels, number)
        by_tensor.enqueue(keys, labels, torch.tensor(number))
        assert torch.equal(by_int.keys, by_tensor.keys)
        assert torch.equal(by_int.labels, by_tensor.labels)


def test_a_step_on_the_device_is_not_for_shards():
    with pytest.raises(ValueError, match="a step on the device was given to a queue in shards"):
        KeyQueue(4, 2, shards=2).enqueue(torch.ones(2, 2), None, torch.tensor(0))


class Unreadable(torch.Tensor):
    """A tensor whose value the host must not look at."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ("item", "__bool__", "__int__", "__index__", "tolist", "cpu"):
            raise AssertionError(f"{function.__name__} waits for the device")
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.capturable])
def test_what_follows_a_step_is_the_same_with_a_step_on_the_device(name):
    states = []
    for step in (7, torch.tensor(7).as_subclass(Unreadable)):
        method = build(name, bank_dtype=torch.bfloat16)
        torch.manual_seed(0)
        method.after_step(method(a_batch(name)), Clock(step, 50, 5))
        states.append(method.state_dict())
    assert all(torch.equal(value, states[1][entry]) for entry, value in states[0].items())


def test_only_a_method_that_the_host_steers_stays_out_of_a_cuda_graph():
    assert [name for name, method in METHODS.items() if not method.capturable] == ["smog"]


@pytest.mark.parametrize("name", METHODS)
def test_what_auto_is(name):
    config = METHODS[name].Config()
    assert config.queue_dtype == "auto"
    for autocast in (torch.float32, *HALVES):
        assert config.bank_dtype(GPU, autocast) == autocast
        assert config.bank_dtype(CPU, autocast) == torch.float32
    for given, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        for device in (CPU, GPU):
            assert METHODS[name].Config(queue_dtype=given).bank_dtype(device, torch.bfloat16) == dtype


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", METHODS)
def test_every_queue_of_a_method_has_the_dtype_and_keeps_it(name, dtype):
    method = build(name, bank_dtype=dtype)
    queues = [module for module in method.modules() if isinstance(module, KeyQueue)]
    assert len(queues) == {"msvq": 2, "smog": 2}.get(name, 1)
    for change in (lambda: None, lambda: method.to(CPU), lambda: a_step(method, sgd(method), a_batch(name))):
        change()
        assert {queue.keys.dtype for queue in queues} == {dtype}
    others = {
        value.dtype for entry, value in method.state_dict().items() if "queue" not in entry and "bank" not in entry
    }
    assert others <= {torch.float32, torch.int64}
    restored = build(name, bank_dtype=dtype)
    restored.load_state_dict(method.state_dict())
    for entry, value in method.state_dict().items():
        assert torch.equal(restored.state_dict()[entry], value), entry


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", METHODS)
def test_rounded_banks_change_loss_and_gradient_no_more_than_their_rounding(name, dtype):
    outcomes = []
    for bank_dtype in (torch.float32, dtype):
        method = build(name, bank_dtype=bank_dtype)
        output, gradient = a_step(method, sgd(method), a_batch(name))
        outcomes.append((output.loss.item(), gradient))
    (loss, gradient), (rounded_loss, rounded_gradient) = outcomes
    assert rounded_loss != loss or name == "smog"  # whose groups have a gradient here, so that they stay exact
    share = 8 * torch.finfo(dtype).eps
    assert abs(rounded_loss - loss) < share * abs(loss)
    assert (rounded_gradient - gradient).norm() < 8 * share * gradient.norm()


def test_positive_pairs_are_not_rounded():
    torch.manual_seed(0)
    method = build("mocov2", bank_dtype=torch.bfloat16)
    batch = a_batch("mocov2")
    kept = method(batch).kept[1]
    assert kept.dtype == torch.float32
    assert not torch.equal(kept, kept.bfloat16().float())


@pytest.mark.parametrize("dtype", HALVES)
def test_kmeans_of_rounded_rows_sums_them_in_float32(dtype):
    rows = unit_rows(4000).to(dtype)
    torch.manual_seed(0)
    start = rows[torch.randperm(4000)[:8]].double()
    torch.manual_seed(0)
    centers = spherical_kmeans(rows, 8, rounds=1)
    assert centers.dtype == torch.float32
    assignment = (rows.double() @ start.T).argmax(1)
    for number, center in enumerate(centers):
        mean = rows[assignment == number].double().sum(0)
        torch.testing.assert_close(center.double(), normalize(mean, dim=0), rtol=0, atol=1e-6)


def test_smog_without_gradient_to_its_groups_reads_them_in_the_dtype(monkeypatch):
    from fastssl.methods import smog

    seen = []
    for function in ("assign_groups", "group_cross_entropy"):
        real = getattr(smog, function)
        monkeypatch.setattr(
            smog,
            function,
            lambda rows, bank, *rest, real=real, **more: seen.append(bank.dtype) or real(rows, bank, *rest, **more),
        )
    for with_gradient, of_loss in ((True, torch.float32), (False, torch.bfloat16)):
        seen.clear()
        method = build("smog", bank_dtype=torch.bfloat16, groups_gradient=with_gradient)
        method(a_batch("smog", count=BATCH))
        assert seen == [torch.bfloat16, torch.bfloat16, of_loss] * len(method.groups)
        assert method.groups.dtype == torch.float32
