"""Heads, batch norm, momentum encoder and queue against definitions and plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastssl.models.ema import ema_update_, momentum_copy
from fastssl.models.encoders import build_encoder
from fastssl.models.heads import LinearHead, MLPHead, build_head
from fastssl.models.norm import SplitBatchNorm2d, SyncBatchNorm, inverse_permutation, norm_layer
from fastssl.models.queue import KeyQueue


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def notebook_split_batch_norm(
    x: Tensor, splits: int, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """SplitBatchNorm as MoCo's CIFAR-10 notebook defines it: output and new running statistics."""
    n, c, h, w = x.shape
    means, variances = mean.repeat(splits), variance.repeat(splits)
    out = nn.functional.batch_norm(
        x.reshape(n // splits, splits * c, h, w),
        means,
        variances,
        weight.repeat(splits),
        bias.repeat(splits),
        True,
        0.1,
        1e-5,
    )
    return out.reshape(n, c, h, w), means.view(splits, c).mean(0), variances.view(splits, c).mean(0)


class TestSplitBatchNorm:
    @pytest.fixture(autouse=True)
    def _compile_anew(self) -> None:
        torch.compiler.reset()

    @pytest.mark.parametrize("splits", [1, 2, 4])
    def test_equals_the_notebook_up_to_the_order_of_samples(self, splits: int) -> None:
        torch.manual_seed(0)
        # Rows in the notebook's order; ours takes the rows of one split together.
        x = torch.randn(8, 5, 3, 3, dtype=torch.float64) * torch.rand(8, 5, 1, 1) + torch.randn(8, 5, 1, 1)
        together = torch.arange(8).view(-1, splits).T.flatten()
        layer = SplitBatchNorm2d(5, splits).double()
        with torch.no_grad():
            layer.weight.normal_()
            layer.bias.normal_()
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
        weight, bias = (tensor.detach().clone().requires_grad_() for tensor in (layer.weight, layer.bias))
        ours_in, theirs_in = (x.detach().clone().requires_grad_() for _ in range(2))
        theirs, mean, variance = notebook_split_batch_norm(
            theirs_in, splits, weight, bias, layer.running_mean.clone(), layer.running_var.clone()
        )
        ours = layer(ours_in[together])[inverse_permutation(together)]
        upstream = torch.randn_like(ours)
        ours.backward(upstream)
        theirs.backward(upstream)
        pairs = [
            (ours, theirs),
            (ours_in.grad, theirs_in.grad),
            (layer.weight.grad, weight.grad),
            (layer.bias.grad, bias.grad),
            (layer.running_mean, mean),
            (layer.running_var, variance),
        ]
        for got, expected in pairs:
            torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
        assert layer.num_batches_tracked == 1

    @pytest.mark.parametrize("shape", [(8, 5, 3, 3), (6, 1, 1, 2), (4, 3, 7, 2)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_the_compiled_form_equals_the_parts(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        results = []
        for compiled in (False, True):
            torch.manual_seed(0)
            layer = SplitBatchNorm2d(shape[1], 2).to(torch.promote_types(dtype, torch.float32))
            for values in (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var):
                values.uniform_(0.5, 2)
            images = (3 * torch.randn(shape) + 1).to(dtype).contiguous(memory_format=torch.channels_last)
            images.requires_grad_()
            upstream = torch.randn(shape).to(dtype)
            output = (torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer)(images)
            output.backward(upstream)
            results.append([output, images.grad, layer.weight.grad, layer.bias.grad, *layer.buffers()])
        for expected, got in zip(*results, strict=True):
            rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
            torch.testing.assert_close(got, expected, rtol=rounding, atol=rounding)

    def test_the_compiled_form_trains_for_more_than_a_step(self) -> None:
        """With torch 2.11 its running statistics required a gradient, and with them the step before."""
        layer = SplitBatchNorm2d(3, 2)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for _ in range(3):
            compiled(torch.randn(4, 3, 2, 2)).sum().backward()
            assert not any(buffer.requires_grad for buffer in layer.buffers())

    def test_the_compiled_form_does_not_grow_with_the_splits(self) -> None:
        """Parts one by one made thousands of launches of a ResNet-50, and minutes of compiling."""
        sizes = []
        for splits in (2, 8):
            graphs: list[torch.fx.GraphModule] = []

            def keep(graph: torch.fx.GraphModule, _: object, kept: list[torch.fx.GraphModule] = graphs) -> object:
                kept.append(graph)
                return graph.forward

            torch.compile(SplitBatchNorm2d(4, splits), backend=keep, fullgraph=True)(torch.randn(16, 4, 2, 2))
            sizes.append(len(graphs[0].graph.nodes))
        assert sizes[0] == sizes[1]

    def test_running_variance_is_the_unbiased_one_of_each_split(self) -> None:
        x = torch.randn(6, 2, 2, 2, dtype=torch.float64)
        layer = SplitBatchNorm2d(2, 3).double()
        layer(x)
        variance = torch.stack([part.transpose(0, 1).flatten(1).var(1) for part in x.chunk(3)]).mean(0)
        torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * variance, atol=1e-12, rtol=0)

    def test_samples_of_other_splits_have_no_influence(self) -> None:
        x = torch.randn(8, 3, 4, 4)
        changed = x.clone()
        changed[4:] *= 10
        layer = SplitBatchNorm2d(3, 2)
        assert torch.equal(layer(x)[:4], layer(changed)[:4])
        assert not torch.equal(layer(x)[4:], layer(changed)[4:])

    def test_evaluation_is_ordinary_batch_norm(self) -> None:
        layer, ordinary = SplitBatchNorm2d(3, 4), nn.BatchNorm2d(3)
        layer(torch.randn(8, 3, 4, 4))
        ordinary.load_state_dict(layer.state_dict())
        x = torch.randn(5, 3, 4, 4)
        assert torch.equal(layer.eval()(x), ordinary.eval()(x))

    def test_compiles_without_graph_breaks(self) -> None:
        layer, same = SplitBatchNorm2d(3, 2), SplitBatchNorm2d(3, 2)
        compiled = torch.compile(same, fullgraph=True, backend="aot_eager")
        x = torch.randn(4, 3, 4, 4)
        torch.testing.assert_close(compiled(x), layer(x), atol=1e-6, rtol=0)
        torch.testing.assert_close(same.running_var, layer.running_var, atol=1e-6, rtol=0)

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="a batch of 6 was given to batch norm in 4 splits"):
            SplitBatchNorm2d(3, 4)(torch.randn(6, 3, 2, 2))
        with pytest.raises(ValueError, match="splits 0 was given"):
            SplitBatchNorm2d(3, 0)
        with pytest.raises(ValueError, match="norm 'layer' was given; allowed are local, split, sync, group"):
            norm_layer("layer")


def test_norm_layers_by_name() -> None:
    assert type(norm_layer("local")(4)) is nn.BatchNorm2d
    assert type(norm_layer("sync")(4)) is SyncBatchNorm
    split = norm_layer("split", splits=2)(4)
    assert isinstance(split, SplitBatchNorm2d)
    assert split.splits == 2


def test_inverse_permutation_undoes_a_shuffle() -> None:
    permutation = torch.randperm(100)
    x = torch.randn(100, 3)
    assert torch.equal(x[permutation][inverse_permutation(permutation)], x)


def test_heads() -> None:
    x = torch.randn(4, 6)
    linear, mlp = build_head("linear", 6, 7, 3), build_head("mlp", 6, 7, 3)
    assert isinstance(linear, LinearHead)
    assert isinstance(mlp, MLPHead)
    assert shapes(linear) == {"weight": (3, 6), "bias": (3,)}
    assert shapes(mlp) == {"0.weight": (7, 6), "0.bias": (7,), "2.weight": (3, 7), "2.bias": (3,)}
    expected = (x @ mlp[0].weight.T + mlp[0].bias).clamp_min(0) @ mlp[2].weight.T + mlp[2].bias
    torch.testing.assert_close(mlp(x), expected, atol=1e-6, rtol=0)
    assert [type(layer) for layer in build_head("mlp-bn", 6, 7, 3)] == [
        nn.Linear,
        nn.BatchNorm1d,
        nn.ReLU,
        nn.Linear,
    ]
    with pytest.raises(ValueError, match="head 'conv' was given; allowed are linear, mlp, mlp-bn"):
        build_head("conv", 6, 7, 3)


class TestMomentum:
    def test_copy_is_equal_frozen_and_independent(self) -> None:
        source = build_encoder("resnet18", width=0.25)
        target = momentum_copy(source)
        for (name, ours), theirs in zip(target.state_dict().items(), source.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs), name
            assert ours.data_ptr() != theirs.data_ptr(), name
        assert not any(parameter.requires_grad for parameter in target.parameters())
        assert all(parameter.requires_grad for parameter in source.parameters())

    @pytest.mark.parametrize("momentum", [0.0, 0.4, 0.999, 1.0])
    def test_update_equals_the_plain_loop_and_leaves_buffers(self, momentum: float) -> None:
        source = build_encoder("resnet18", width=0.25)
        target = momentum_copy(build_encoder("resnet18", width=0.25))
        source(torch.randn(2, 3, 32, 32))
        expected = {
            name: momentum * parameter.double() + (1 - momentum) * theirs.detach().double()
            for (name, parameter), theirs in zip(target.named_parameters(), source.parameters(), strict=True)
        }
        buffers = {name: buffer.clone() for name, buffer in target.named_buffers()}
        kept = {name: tensor.clone() for name, tensor in source.state_dict().items()}
        ema_update_(target, source, momentum)
        for name, parameter in target.named_parameters():
            # Measured 6e-8: one rounding to float32.
            torch.testing.assert_close(parameter.double(), expected[name], atol=2e-7, rtol=0)
        for name, buffer in target.named_buffers():
            assert torch.equal(buffer, buffers[name]), name
        for name, tensor in source.state_dict().items():
            assert torch.equal(tensor, kept[name]), name

    def test_errors(self) -> None:
        layer = nn.Linear(2, 2)
        with pytest.raises(ValueError, match=r"momentum 1\.5 was given; it must lie in \[0, 1\]"):
            ema_update_(momentum_copy(layer), layer, 1.5)
        with pytest.raises(ValueError, match="the target must be a momentum_copy of the source"):
            ema_update_(nn.Linear(3, 2), layer, 0.9)


class TestQueue:
    def test_starts_with_unit_rows_of_unknown_label_from_the_generator(self) -> None:
        queue, same, other = (KeyQueue(50, 8, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
        torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(50), atol=1e-6, rtol=0)
        assert torch.equal(queue.keys, same.keys)
        assert not torch.equal(queue.keys, other.keys)
        assert queue.keys.dtype == torch.float32
        assert queue.labels.dtype == torch.int64
        assert (queue.labels == -1).all()

    @pytest.mark.parametrize(("size", "batch"), [(12, 4), (10, 4), (7, 3), (5, 5), (9, 1)])
    def test_holds_the_last_keys_in_order_of_arrival(self, size: int, batch: int) -> None:
        queue = KeyQueue(size, 2)
        keys_in_time, labels_in_time = queue.keys.clone(), queue.labels.clone()
        for step in range(3 * size):
            keys = torch.full((batch, 2), float(step)) + torch.arange(batch)[:, None] / batch
            labels = torch.arange(batch) + step * batch
            queue.enqueue(keys, labels, step)
            keys_in_time = torch.cat((keys_in_time, keys))
            labels_in_time = torch.cat((labels_in_time, labels))
            # Arrival a (the first `size` are the initial rows) is in slot a mod size
            arrivals = torch.arange(len(keys_in_time))[-size:]
            assert torch.equal(queue.keys[arrivals % size], keys_in_time[-size:])
            assert torch.equal(queue.labels[arrivals % size], labels_in_time[-size:])

    def test_keys_without_labels_become_unknown(self) -> None:
        queue = KeyQueue(6, 2)
        queue.enqueue(torch.ones(4, 2), torch.arange(4), 0)
        queue.enqueue(torch.ones(4, 2), None, 1)
        assert queue.labels.tolist() == [-1, -1, 2, 3, -1, -1]

    def test_takes_half_precision_keys_that_require_grad(self) -> None:
        queue = KeyQueue(4, 2)
        keys = torch.ones(2, 2, dtype=torch.bfloat16, requires_grad=True)
        queue.enqueue(keys, None, 0)
        assert queue.keys.dtype == torch.float32
        assert not queue.keys.requires_grad
        assert torch.equal(queue.keys[:2], torch.ones(2, 2))

    def test_state_dict_is_the_complete_state(self) -> None:
        queue, resumed = KeyQueue(10, 2), KeyQueue(10, 2)
        queue.enqueue(torch.ones(4, 2), torch.arange(4), 0)
        resumed.load_state_dict(queue.state_dict())
        for each in (queue, resumed):
            each.enqueue(torch.zeros(4, 2), torch.arange(4, 8), 1)
        assert set(queue.state_dict()) == {"keys", "labels"}
        assert torch.equal(queue.keys, resumed.keys)
        assert torch.equal(queue.labels, resumed.labels)

    def test_errors(self) -> None:
        queue = KeyQueue(4, 2)
        with pytest.raises(ValueError, match="5 keys were given to a queue of 4"):
            queue.enqueue(torch.ones(5, 2), None, 0)
        with pytest.raises(ValueError, match=r"\[2, 3\] were given; the queue takes \[B, 2\]"):
            queue.enqueue(torch.ones(2, 3), None, 0)
        with pytest.raises(ValueError, match=r"labels of shape \[3\] were given for 2 keys"):
            queue.enqueue(torch.ones(2, 2), torch.zeros(3, dtype=torch.int64), 0)
        with pytest.raises(ValueError, match="a queue of 0 keys"):
            KeyQueue(0, 2)
