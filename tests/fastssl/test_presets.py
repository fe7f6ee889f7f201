"""The presets against values from their sources, which each test names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastssl.cli import main
from fastssl.commands.presets import WIDTH
from fastssl.config import OptimConfig, from_json, to_json
from fastssl.methods import METHODS
from fastssl.presets import PRESETS, load
from fastssl.train.build import build_method
from fastssl.train.optim import build_optimizer

DATA = {
    "imagenet": "ImageNet",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "stl10": "STL-10",
    "tinyimagenet": "Tiny ImageNet",
}
BUILTIN = [name for name in PRESETS if PRESETS.origins[name][0].startswith("fastssl.")]  # Not those of plug-ins
NAMED = sorted({*BUILTIN} - {"quickstart"})
SMALL = [name for name in NAMED if not name.endswith("-imagenet")]


def data_of(name):
    return name.rsplit("-", 1)[1]


def optim(config):
    """Rate, weight decay, schedule, epochs of warm-up, epochs, batch."""
    o, t = config.optim, config.train
    return o.lr, o.weight_decay, o.schedule, o.warmup_epochs, t.epochs, t.batch_size


def contrast(config):
    """Temperature, queue, momentum, head and its widths."""
    m = config.method
    return m.temperature, m.queue_size, m.momentum, m.head, m.hidden_dim, m.dim


def view(v):
    """Pixels, scale, flip, jitter and its probability, gray, blur, solarize."""
    return v.size, v.scale, v.flip, v.jitter, v.jitter_probability, v.grayscale, v.blur, v.solarize


def strong(size, blur=0.5, scale=(0.2, 1.0)):
    return size, scale, 0.5, (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, blur, 0.0


def weak(size, flip):
    return size, (0.2, 1.0), flip, 0.0, 0.0, 0.0, 0.0


def weak_of(v):
    """A view without the strength of its jitter, whose probability must be 0."""
    values = view(v)
    return values[:3] + values[4:]


@pytest.mark.parametrize("name", NAMED)
def test_names_are_method_and_data(name):
    config, stem = load(name), name.rsplit("-", 1)[0]
    assert PRESETS[name].data == DATA[data_of(name)]
    assert stem == config.method.name or stem.startswith(config.method.name + "-")
    assert config.preset == name


def test_every_method_has_a_recipe_and_the_published_ones_have_one_per_data_set():
    own = {name for name, cls in METHODS.items() if cls.__module__.startswith("fastssl.")}
    assert {load(name).method.name for name in BUILTIN} == own
    published = {"mocov1", "mocov2", "unimoco", "supcon", "mixco", "unmix", "co2", "ressl", "msvq", "smog"}
    with_imagenet = {load(name).method.name for name in NAMED if data_of(name) == "imagenet"}
    with_cifar10 = {load(name).method.name for name in NAMED if data_of(name) == "cifar10"}
    assert with_imagenet >= published
    assert with_cifar10 >= published - {"mocov1"}  # Its authors published only v2 there
    for data in ("cifar100", "stl10", "tinyimagenet"):
        assert {load(n).method.name for n in NAMED if data_of(n) == data} >= {"mocov2", "unmix", "ressl", "msvq"}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_json_with_and_without_changes(name):
    config = load(name)
    METHODS[config.method.name].check_views(config.views)
    changed = replace(config, train=replace(config.train, steps=7), data=replace(config.data, root=Path("/some/where")))
    for each in (config, changed):
        assert from_json(to_json(each)) == each


@pytest.mark.parametrize("name", SMALL)
def test_the_method_and_optimizer_of_a_small_preset_can_be_built(name):
    config = load(name)
    method = build_method(replace(config, model=replace(config.model, width=1 / 16)), torch.device("cpu"))
    assert type(method) is METHODS[config.method.name]
    assert method.encoder().feature_dim == 32
    groups = build_optimizer(method, config.optim).param_groups
    trained = [p for p in method.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(trained) > 0


@pytest.mark.parametrize("name", NAMED)
def test_the_network_fits_the_data(name):
    """facebookresearch/moco (notebook), pc-cp/MSVQ network/base_model.py: 3x3 stem, max-pool for 64 pixels."""
    config = load(name)
    model, size = config.model, config.views[0].size
    if data_of(name) == "imagenet":
        expected = ("resnet50", "imagenet", 224)
    elif name == "mixco-tinyimagenet":
        expected = ("resnet18", "imagenet", 224)
    elif data_of(name).startswith("cifar"):
        expected = ("resnet18", "small", 32)
    else:
        expected = ("resnet18", "small-pool", 64)
    assert (model.encoder, model.stem, size) == expected
    assert model.width == 1
    splits = {"smog": None, "mixco-tinyimagenet": 2}
    expected_splits = splits.get(name, splits.get(config.method.name, 8))
    assert (model.splits if model.norm == "split" else None) == expected_splits


def test_normalization_and_evaluation_view():
    """pc-cp/MSVQ dataset/data.py; szq0214/Un-Mix unmix_c100.py has CIFAR-10's statistics; SMoG's 0.228 is SwAV's."""
    cifar10 = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    expected = {
        "msvq-cifar10": (*cifar10, 32, 1.0),
        "unmix-cifar100": (*cifar10, 32, 1.0),
        "msvq-cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), 32, 1.0),
        "msvq-stl10": ((0.4408, 0.4279, 0.3867), (0.2682, 0.2610, 0.2686), 96, 1.0),
        "msvq-tinyimagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262), 64, 1.0),
        "mixco-tinyimagenet": (*imagenet, 224, 0.875),
        "mocov2-imagenet": (*imagenet, 224, 0.875),
        "smog-imagenet": (imagenet[0], (0.228, 0.224, 0.225), 224, 0.875),
    }
    for name, values in expected.items():
        config = load(name)
        assert (config.data.mean, config.data.std, config.eval_view.size, config.eval_view.center_crop) == values


def test_the_quickstart_is_the_measured_one():
    config = load("quickstart")
    assert contrast(config) == (0.1, 512, 0.98, "mlp-bn", None, 128)
    assert optim(config) == (0.12, 5e-4, "cosine", 3, 24, 128)
    assert (config.optim.optimizer, config.optim.warmup_lr, config.optim.final_lr) == ("sgd", 0, 0)
    assert (config.data.pictures, config.data.label_fraction) == (6000, 0.1)
    assert (config.model.width, config.model.stem, config.model.norm) == (0.25, "small-pool", "local")
    assert view(config.views[0]) == strong(32, blur=0, scale=(0.5, 1.0))


def test_moco_on_imagenet():
    """facebookresearch/moco main_moco.py, moco/loader.py and README; dddzg/unimoco README (800 epochs)."""
    v1, v2, unimoco, supcon = (load(f"{name}-imagenet") for name in ("mocov1", "mocov2", "unimoco", "supcon"))
    assert contrast(v1) == (0.07, 65536, 0.999, "linear", None, 128)
    assert optim(v1) == (0.03, 1e-4, "step", 0, 200, 256)
    assert v1.optim.milestones == (120, 160)
    jitter = (0.4, 0.4, 0.4, 0.4)
    assert {view(v) for v in v1.views} == {(224, (0.2, 1.0), 0.5, jitter, 1.0, 0.2, 0.0, 0.0)}
    for config in (v2, unimoco, supcon):
        assert contrast(config) == (0.2, 65536, 0.999, "mlp", None, 128)
        assert optim(config)[:4] == (0.03, 1e-4, "cosine-epoch", 0)
        assert {view(v) for v in config.views} == {strong(224)}
        assert config.views[0].blur_sigma == (0.1, 2.0)
    assert [c.train.epochs for c in (v2, unimoco, supcon)] == [200, 800, 800]
    assert (unimoco.data.label_fraction, supcon.data.label_fraction) == (0.1, 1.0)


def test_mixco_and_unmix_on_imagenet():
    """MixCo exp_mix_res50_imagenet.sh (--mixco-t 1); Un-Mix for_ImageNet/run.sh (--unmix_prob 0.5), both on MoCo v2."""
    v2, mixco, unmix = (load(f"{name}-imagenet") for name in ("mocov2", "mixco", "unmix"))
    for config in (mixco, unmix):
        assert optim(config) == optim(v2)
        assert contrast(config) == contrast(v2)
        assert config.views == v2.views
    assert (mixco.method.mix_temperature, mixco.method.mix_weight) == (1.0, 1.0)
    assert (unmix.method.global_probability, unmix.method.symmetric) == (0.5, False)


def test_co2():
    """Weights of ImageNet from memory, so UNVERIFIED; philippmwirth/co2 README and moco.py for CIFAR-10."""
    for name, base, weight, temperature in (
        ("co2-imagenet", "mocov2-imagenet", 0.3, 0.05),
        ("co2-mocov1-imagenet", "mocov1-imagenet", 10.0, 0.04),
        ("co2-cifar10", "mocov2-cifar10", 1.0, 1.0),
    ):
        config, moco = load(name), load(base)
        assert (config.method.consistency_weight, config.method.consistency_temperature) == (weight, temperature)
        assert optim(config) == optim(moco)
        assert config.views == moco.views
        assert contrast(config)[:3] == contrast(moco)[:3]
    assert load("co2-mocov1-imagenet").method.head == "linear"
    assert "UNVERIFIED" in PRESETS["co2-imagenet"].differs
    cifar = load("co2-cifar10").method
    assert (cifar.head, cifar.include_positive, cifar.symmetric) == ("mlp", True, False)


def test_ressl_and_msvq_on_imagenet():
    """mingkai-zheng/ReSSL ressl.py, data/augmentation.py, network/ressl.py; MSVQ has no published recipe there."""
    ressl, msvq = load("ressl-imagenet"), load("msvq-imagenet")
    assert contrast(ressl) == (0.1, 131072, 0.999, "mlp", 4096, 512)
    for config, teachers in ((ressl, 1), (msvq, 3)):
        assert optim(config) == (0.05, 1e-4, "cosine", 5, 200, 256)
        assert not config.optim.decay_norm_and_bias
        assert config.method.teacher_temperature == 0.04
        assert view(config.views[0]) == strong(224)
        assert [weak_of(v) for v in config.views[1:]] == [weak(224, flip=0.5)] * teachers
    assert contrast(msvq) == (0.1, 65536, 0.999, "mlp", 2048, 128)
    assert PRESETS["msvq-imagenet"].published.startswith("none")


def test_smog_on_imagenet():
    """SMoG_code.zip: scripts and main_SMoG.py, for batch 4096; rates scaled to 512."""
    config = load("smog-imagenet")
    m, o = config.method, config.optim
    assert (m.temperature, m.groups, m.heads, m.group_momentum, m.momentum) == (0.1, 3000, 3, 0.99, 0.999)
    assert (m.dim, m.hidden_dim, m.reset_epochs) == (128, 2048, 1)
    assert optim(config) == (4.8 / 8, 1e-6, "cosine", 10, 400, 512)
    assert (o.optimizer, o.trust, o.momentum) == ("lars", 0.001, 0.9)
    assert (o.final_lr, o.warmup_lr) == (0.0048 / 8, 0.01 / 8)
    jitter = (0.4, 0.4, 0.2, 0.1)
    whole, part = (224, (0.2, 1.0)), (96, (0.05, 0.2))
    a, b = (0.5, jitter, 0.8, 0.2, 1.0, 0.0), (0.5, jitter, 0.8, 0.2, 0.1, 0.2)
    assert [view(v) for v in config.views] == [whole + a] * 2 + [whole + b] * 2 + [part + a] * 4
    assert [view(v) for v in config.odd_views] == [whole + b] * 2 + [whole + a] * 2 + [part + b] * 4


@pytest.mark.parametrize(
    ("name", "epochs", "symmetric"),
    [
        ("mocov2-cifar10", 200, False),
        ("mocov2-symmetric-cifar10", 200, True),
        ("unimoco-cifar10", 200, False),
        ("supcon-cifar10", 200, False),
        ("mocov2-symmetric-cifar100", 1000, True),
        ("unmix-cifar10", 1000, True),
        ("unmix-cifar100", 1000, True),
    ],
)
def test_recipes_of_the_cifar_notebook(name, epochs, symmetric):
    """facebookresearch/moco, branch colab-notebook; szq0214/Un-Mix unmix_c10.py and unmix_c100.py."""
    config = load(name)
    assert contrast(config) == (0.1, 4096, 0.99, "linear", None, 128)
    assert optim(config) == (0.06, 5e-4, "cosine-epoch", 0, epochs, 512)
    assert {view(v) for v in config.views} == {strong(32, blur=0, scale=(0.08, 1.0))}
    assert config.method.symmetric == symmetric
    assert config.data.label_fraction == (0.1 if name.startswith("unimoco") else 1.0)
    assert getattr(config.method, "global_probability", 0.5) == 0.5


@pytest.mark.parametrize(
    ("data", "size", "queue_size", "momentum", "second_momentum", "temperature"),
    [
        ("cifar10", 32, 4096, 0.99, 0.95, 0.04),
        ("cifar100", 32, 4096, 0.99, 0.93, 0.03),
        ("stl10", 64, 16384, 0.996, 0.99, 0.04),
        ("tinyimagenet", 64, 16384, 0.996, 0.99, 0.04),
    ],
)
def test_recipes_of_msvq(data, size, queue_size, momentum, second_momentum, temperature):
    """pc-cp/MSVQ README, msvq.py, dataset/data.py; ReSSL and MoCo v2: pc-cp/Benchmark-Methods-For-MNN main_pretrain.py,
    main_pretrain_evaluation.sh, network/ReSSL.py, network/MoCo.py."""
    msvq, ressl, moco = (load(f"{name}-{data}") for name in ("msvq", "ressl", "mocov2"))
    assert contrast(msvq) == (0.1, queue_size, momentum, "mlp", 2048, 128)
    assert (msvq.method.second_momentum, msvq.method.teacher_temperature) == (second_momentum, temperature)
    assert contrast(ressl) == (0.1, queue_size, momentum, "mlp", 2048, 128)
    assert ressl.method.teacher_temperature == 0.04
    for config, teachers in ((msvq, 3), (ressl, 1)):
        assert optim(config) == (0.06, 5e-4, "cosine", 5, 200, 256)
        assert view(config.views[0]) == strong(size)
        assert [weak_of(v) for v in config.views[1:]] == [weak(size, flip=0.9)] * teachers
    if data != "cifar10":  # There MoCo v2 has its authors' recipe
        assert contrast(moco) == (0.2, queue_size, momentum, "mlp", 2048, 128)
        assert optim(moco) == (0.06, 5e-4, "cosine", 5, 200, 256)
        assert {view(v) for v in moco.views} == {strong(size)}


def test_mixco_on_tiny_imagenet():
    """Lee-Gihun/MixCo-Mixup-Contrast exp_mix_res18_tinyimg.sh and data_utils/data_loader.py."""
    config = load("mixco-tinyimagenet")
    assert contrast(config) == (0.2, 65536, 0.999, "mlp", None, 128)
    assert (config.method.mix_temperature, config.method.mix_weight) == (0.05, 1.0)
    assert optim(config) == (0.015, 1e-4, "cosine-epoch", 0, 100, 128)
    assert {view(v) for v in config.views} == {strong(224)}


def test_recipes_of_our_own():
    """MixCo and Un-Mix on the recipe of the data set's MoCo v2; SMoG with about 300 steps of 512 between resets."""
    for name, base in (
        ("mixco-cifar10", "mocov2-cifar10"),
        ("unmix-stl10", "mocov2-stl10"),
        ("unmix-tinyimagenet", "mocov2-tinyimagenet"),
    ):
        config, moco = load(name), load(base)
        assert (optim(config), contrast(config), config.views) == (optim(moco), contrast(moco), moco.views)
    smog = load("smog-cifar10")
    assert optim(smog) == (0.06, 5e-4, "cosine", 10, 200, 512)
    assert (smog.method.groups, smog.method.reset_epochs, smog.method.bank_size) == (300, 3, 50000)
    assert [v.size for v in smog.views] == [32, 32, 32, 32, 16, 16]
    assert [v.solarize for v in smog.views] == [0, 0, 0.2, 0.2, 0, 0]
    assert [v.solarize for v in smog.odd_views] == [0.2, 0.2, 0, 0, 0.2, 0.2]


@pytest.mark.parametrize("name", [name for name in NAMED if PRESETS[name].source.startswith("ours")])
def test_recipes_of_our_own_claim_no_result(name):
    assert PRESETS[name].published.startswith(("none", "not read"))


def test_only_smog_swaps_views_and_only_it_uses_lars():
    for name in BUILTIN:
        config = load(name)
        assert bool(config.odd_views) == (config.method.name == "smog")
        assert (config.optim.optimizer == "lars") == (name == "smog-imagenet")
        assert config.optim.trust == OptimConfig().trust


def test_the_listing_shows_every_fact_of_every_preset(capsys):
    assert main(["presets"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= WIDTH
    blocks = {block.split()[0]: " ".join(block.split()) for block in text.split("\n\n")}
    for name, preset in PRESETS.items():
        config = preset.build()
        assert blocks[name].startswith(f"{name} {config.method.name}, {config.train.epochs} epochs ")
        for fact in (preset.published, preset.source, preset.differs):
            assert fact in blocks[name]
    for title in DATA.values():
        assert text.count(f"=== {title} ===") == 1
