"""Banks without gradient may have 16 bits: queues of all methods, batch keys, groups without gradient."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import normalize

from fastssl.cli import main
from fastssl.config import from_json
from fastssl.methods import METHODS, TrainProgress, smog
from fastssl.models.kmeans import spherical_kmeans
from fastssl.models.queue import KeyQueue, queue_hash
from fastssl.train import checkpoint
from tests.fastssl.rank_runs import a_method, a_run, fork_ranks, join
from tests.fastssl.small_methods import BATCH, SHARDABLE, a_batch, a_step, build, sgd
from tests.fastssl.test_runs import assert_same, final_state
from tests.faults.runs import contents, refusal, train

HALVES = (torch.bfloat16, torch.float16)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def unit_rows(count, dim=8, seed=0):
    return normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_queue_draws_the_same_keys_in_every_dtype_and_rounds_new_ones(dtype):
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


def test_the_hash_of_a_float32_queue_has_not_changed():
    queue = KeyQueue(12, 4, torch.Generator().manual_seed(3))
    queue.enqueue(torch.eye(4), torch.arange(4), 2)
    assert queue.checksum().item() == 209357770061426036


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [5, 12, 13, 40])
def test_a_step_on_the_device_writes_to_the_same_place_as_an_int(size, dtype):
    by_int, by_tensor = (KeyQueue(size, 4, torch.Generator().manual_seed(1), dtype=dtype) for _ in range(2))
    for step in [*range(20), 10**9]:
        keys, labels = unit_rows(5, 4, step), torch.arange(5) + step if step % 2 else None
        by_int.enqueue(keys, labels, step)
        by_tensor.enqueue(keys, labels, torch.tensor(step))
        assert torch.equal(by_int.keys, by_tensor.keys)
        assert torch.equal(by_int.labels, by_tensor.labels)


def test_a_step_on_the_device_is_refused_for_shards():
    with pytest.raises(ValueError, match="a step on the device was given to a queue in shards"):
        KeyQueue(4, 2, shards=2).enqueue(torch.ones(2, 2), None, torch.tensor(0))


class Unreadable(torch.Tensor):
    """A tensor whose value the host must not read."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ("item", "__bool__", "__int__", "__index__", "tolist", "cpu"):
            raise AssertionError(f"{function.__name__} waits for the device")
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.capturable])
def test_after_step_is_the_same_with_a_step_on_the_device(name):
    states = []
    for step in (7, torch.tensor(7).as_subclass(Unreadable)):
        method = build(name, bank_dtype=torch.bfloat16)
        torch.manual_seed(0)
        method.after_step(method(a_batch(name)), TrainProgress(step, 50, 5))
        states.append(method.state_dict())
    assert all(torch.equal(value, states[1][entry]) for entry, value in states[0].items())


def test_only_methods_that_need_the_host_stay_out_of_cuda_graphs():
    assert [name for name, method in METHODS.items() if not method.capturable] == ["smog"]


@pytest.mark.parametrize("name", METHODS)
def test_the_dtype_that_auto_chooses(name):
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
def test_rounded_banks_change_loss_and_gradient_only_by_rounding(name, dtype):
    outcomes = []
    for bank_dtype in (torch.float32, dtype):
        method = build(name, bank_dtype=bank_dtype)
        output, gradient = a_step(method, sgd(method), a_batch(name))
        outcomes.append((output.loss.item(), gradient))
    (loss, gradient), (rounded_loss, rounded_gradient) = outcomes
    assert rounded_loss != loss or name == "smog"  # SMoG's groups have a gradient here, so they stay exact
    tolerance = 8 * torch.finfo(dtype).eps
    assert abs(rounded_loss - loss) < tolerance * abs(loss)
    assert (rounded_gradient - gradient).norm() < 8 * tolerance * gradient.norm()


def test_positive_pairs_are_not_rounded():
    torch.manual_seed(0)
    method = build("mocov2", bank_dtype=torch.bfloat16)
    batch = a_batch("mocov2")
    keys = method(batch).updates[1]
    assert keys.dtype == torch.float32
    assert not torch.equal(keys, keys.bfloat16().float())


@pytest.mark.parametrize("dtype", HALVES)
def test_kmeans_of_rounded_rows_sums_them_in_float32(dtype):
    rows = unit_rows(4000).to(dtype)
    torch.manual_seed(0)
    start = rows[torch.randperm(4000)[:8]].double()
    torch.manual_seed(0)
    centers = spherical_kmeans(rows, 8, rounds=1)
    assert centers.dtype == torch.float32
    assignment = (rows.double() @ start.T).argmax(1)
    for index, center in enumerate(centers):
        mean = rows[assignment == index].double().sum(0)
        torch.testing.assert_close(center.double(), normalize(mean, dim=0), rtol=0, atol=1e-6)


def test_smog_without_gradient_to_its_groups_reads_them_in_the_dtype(monkeypatch):
    seen = []
    for function in ("nearest_entry", "bank_cross_entropy"):
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


@pytest.fixture(scope="module")
def rounded_run(tmp_path_factory):
    """A run of 4 steps with a bfloat16 queue that can be resumed; read-only."""
    folder = tmp_path_factory.mktemp("runs") / "rounded"
    assert train(folder, "--optim.schedule", "step", "--method.queue-dtype", "bf16") == 0
    return folder


@pytest.fixture
def run(rounded_run, tmp_path):
    """A copy of it with two steps left."""
    (run := shutil.copytree(rounded_run, tmp_path / "run")).joinpath("checkpoints/step_000000004.pt").unlink()
    return run


def edited(run, change):
    values = json.loads((run / "config.json").read_text())
    change(values["method"])
    (run / "config.json").write_text(json.dumps(values))


def test_a_run_with_a_rounded_queue_resumes_bit_for_bit(run, rounded_run):
    state = checkpoint.load(run / "checkpoints" / "step_000000002.pt")
    assert state["method"]["queue.keys"].dtype == torch.bfloat16
    assert main(["resume", str(run)]) == 0
    assert_same(final_state(run), final_state(rounded_run))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "auto"])
def test_a_queue_of_another_dtype_is_one_sentence(run, capsys, dtype):
    edited(run, lambda method: method.update(queue_dtype=dtype))
    before = contents(run)
    error = refusal(capsys, ["resume", str(run)])
    now = {"fp16": "float16"}.get(dtype, "float32")
    for word in ("--method.queue-dtype", "queue_dtype", f"is {now} in this run and was bfloat16", "step_000000002.pt"):
        assert word in error
    assert contents(run) == before
    edited(run, lambda method: method.update(queue_dtype="bf16"))
    assert main(["resume", str(run)]) == 0


def test_the_option_may_name_the_dtype_that_auto_chose(tmp_path):
    run = tmp_path / "run"
    assert train(run, "--optim.schedule", "step", steps=2) == 0
    edited(run, lambda method: method.update(queue_dtype="fp32"))
    assert main(["resume", str(run)]) == 0
    assert "--method.queue-dtype is fp32 from here on and was auto before" in (run / "console.log").read_text()


def without_dtypes(facts):
    return {name: value for name, value in facts.items() if "queue_dtype" not in name}


def with_old_names(text):
    for new, old in (("unlabeled", "unlabelled"), ("grayscale", "grey"), ("center_crop", "centre")):
        text = text.replace(new, old)
    return text


def aged(run):
    """Turn a run into one of config.json format 1 and checkpoint format 3, from before the option queue_dtype."""
    edited(run, lambda method: method.pop("queue_dtype"))
    values = json.loads(with_old_names((run / "config.json").read_text()))
    assert values.pop("format") == 2
    (run / "config.json").write_text(json.dumps(values))
    for path in (run / "checkpoints").glob("*.pt"):
        state = checkpoint.load(path)
        step, facts = state.pop("step"), without_dtypes(state["facts"])
        path.unlink()
        old = {"format": 3, "facts": json.loads(with_old_names(json.dumps(facts)))}
        checkpoint.save(path.parent, state | old, step=step, keep=9)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "facts" in line:
            line["facts"] = json.loads(with_old_names(json.dumps(without_dtypes(line["facts"]))))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_runs_of_earlier_formats_resume_with_float32_queues(tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    assert train(new, "--optim.schedule", "step") == 0
    shutil.copytree(new, old)
    aged(old)
    (old / "checkpoints" / "step_000000004.pt").unlink()
    config = from_json((old / "config.json").read_text())
    assert config.method.bank_dtype(GPU, torch.bfloat16) == torch.float32
    assert main(["resume", str(old)]) == 0
    assert_same(final_state(old)["method"], final_state(new)["method"])
    assert "from here on" not in (old / "console.log").read_text()
    assert main(["eval", "knn", str(old)]) == 0


def test_an_old_checkpoint_cannot_resume_with_a_rounded_queue(tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run, "--optim.schedule", "step", steps=2) == 0
    aged(run)
    edited(run, lambda method: method.update(queue_dtype="bf16"))
    assert "is bfloat16 in this run and was float32" in refusal(capsys, ["resume", str(run)])


def test_a_checkpoint_with_a_rounded_queue_is_evaluated_anywhere(rounded_run):
    assert main(["eval", "knn", str(rounded_run)]) == 0


def run_of(name, shard=False):
    """A run with a bfloat16 queue, its queues' hash, and the dtypes in which unit rows were gathered after steps."""
    options = {"bank_dtype": torch.bfloat16} | ({"shard_queue": True} if shard else {})
    method = a_method(name, options)
    gathered, gather_keys = [], method.gather_keys

    def recorded(keys):
        rows = gather_keys(keys)
        gathered.append(rows.dtype)
        return rows

    method.gather_keys = recorded
    run = a_run(method, range(3))
    return run, queue_hash(method), set(gathered)


def a_rank(rank, folder):
    join(f"{folder}/store", rank, 2)
    whole = {name: run_of(name) for name in METHODS if name != "smog"}  # SMoG has batch norm in its heads
    shards = {name: run_of(name, shard=True) for name in SHARDABLE}
    torch.save((whole, shards), f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    fork_ranks(a_rank, (str(folder),), 2)
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(2)]


def assert_close_runs(run, expected, tolerance):
    for ours, theirs in zip(run[0], expected[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)
    for ours, theirs in zip(run[2], expected[2], strict=True):
        assert (ours - theirs).norm() < 8 * tolerance * theirs.norm()
    for entry, value in expected[3].items():
        if value.dtype == torch.bfloat16:
            assert run[3][entry].dtype == torch.bfloat16
            torch.testing.assert_close(run[3][entry], value, rtol=2**-7, atol=1e-4)  # One bit


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if name != "smog"])
def test_ranks_gather_rounded_keys_and_train_as_one(two_ranks, name):
    expected, _, _ = run_of(name)
    for whole, _ in two_ranks:
        run, _, gathered = whole[name]
        assert gathered == {torch.bfloat16}
        assert_close_runs(run, expected, 1e-4)
    assert two_ranks[0][0][name][1] == two_ranks[1][0][name][1]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDABLE)
def test_shards_of_a_rounded_queue_train_as_the_whole_except_for_rounded_queries(two_ranks, name):
    expected, _, _ = run_of(name)
    for _, shards in two_ranks:
        run, hashed, _ = shards[name]
        assert_close_runs(run, expected, 2e-3)
        whole = a_method(name, {"bank_dtype": torch.bfloat16})
        whole.load_state_dict(run[3])
        assert hashed == queue_hash(whole)
