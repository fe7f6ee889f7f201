"""Opening sources of every kind, list files, and the same images on any number of ranks."""

from __future__ import annotations

import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl_pipelines import (
    ArraySource,
    DataError,
    ImageFolder,
    ListedImages,
    SamplePlan,
    TarShards,
    TrainSampler,
    ViewSpec,
    build_executor,
    list_images,
    open_source,
)
from fastssl_pipelines.sources.base import JointSource, Subset


def write(path, value=0, height=6, width=5):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path):
    """Class folders cat and dog with four images of different sizes, and the same in a shard and in lists."""
    names = ["cat/1.png", "cat/2 b.png", "dog/1.png", "dog/deep/3.png"]
    for value, name in enumerate(names):
        write(tmp_path / "folders" / name, value, 20 + 5 * value, 44 - 3 * value)
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for name in names:
            archive.add(tmp_path / "folders" / name, f"{name.split('/')[0]}/{name.split('/')[-1]}")
    (tmp_path / "tabs.txt").write_text("".join(f"folders/{name}\t{name[:3]}\n" for name in names))
    (tmp_path / "caffe.txt").write_text("".join(f"folders/{name} {int(name[0] == 'd')}\n" for name in names))
    (tmp_path / "plain.txt").write_text("".join(f"{tmp_path}/folders/{name}\n\n" for name in names))
    return tmp_path


@pytest.mark.parametrize(
    ("path", "kind", "classes"),
    [
        ("folders", ImageFolder, ("cat", "dog")),
        ("folders/dog/deep", ImageFolder, ()),
        ("shard.tar", TarShards, ("cat", "dog")),
        ("tabs.txt", ListedImages, ("cat", "dog")),
        ("caffe.txt", ListedImages, ("0", "1")),
        ("plain.txt", ListedImages, ()),
    ],
)
def test_every_kind_is_recognized(root, path, kind, classes):
    source = open_source(root / path)
    assert (type(source), source.classes, source.option) == (kind, classes, "--data.root")
    assert source.labels.tolist() == ([0, 0, 1, 1] if classes else [-1] * len(source))
    heights = [20, 25, 30, 35] if len(source) == 4 else [35]
    assert source.heights.tolist() == heights
    assert [len(source.pixels(i)) for i in range(len(source))] == heights
    listing = list_images(root / path)
    assert list(listing.names) == [source.name_of(i) for i in range(len(source))]
    assert (listing.labels.tolist(), listing.classes) == (source.labels.tolist(), classes)
    for i in range(len(source)):
        assert listing.encoded(i) == source.encoded(i)
        assert listing.describe(i) == source.describe(i)


@pytest.mark.parametrize("path", ["folders", "shard.tar", "tabs.txt", "caffe.txt"])
def test_every_kind_can_be_opened_without_labels(root, path):
    for source in (open_source(root / path, labeled=False), list_images(root / path, labeled=False)):
        assert (source.labels.tolist(), source.classes, source.option) == ([-1] * 4, (), "--data.unlabeled")


def test_names_in_a_list_are_as_written_there(root):
    (root / "folders" / "list.txt").write_text("\ufeff./cat/../dog/1.png\tdög \r\ncat/1.png\tä\r\n", encoding="utf-8")
    source = open_source(root / "folders" / "list.txt")
    assert [source.name_of(i) for i in range(2)] == ["dog/1.png", "cat/1.png"]
    assert (source.classes, source.labels.tolist()) == (("dög", "ä"), [0, 1])
    assert source.describe(0) == f"{root}/folders/dog/1.png"
    absolute = open_source(root / "plain.txt")
    assert absolute.name_of(1) == absolute.describe(1) == f"{root}/folders/cat/2 b.png"


def test_integer_classes_are_sorted_by_value(root):
    (root / "many.txt").write_text("folders/cat/1.png 10\nfolders/dog/1.png 9\nfolders/cat/2 b.png 100\n")
    source = open_source(root / "many.txt")
    assert (source.classes, source.labels.tolist()) == (("9", "10", "100"), [1, 0, 2])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cat/1.png\n\ncat/none.png\ncat/no.png\n", r"line 3 of .*list\.txt names .*cat/none\.png.*2 such of 3"),
        (b"cat/1.png 1\ncat/2 b.png\n", r"line 1 .* names .*1\.png 1, which cannot be found"),
        (b"cat/1.png\tcat\ndog/1.png\n", r"line 2 .* has no class"),
        (b"\n \n", r"names no image"),
        (b"\xff\xfe\x00", r"is not UTF-8 text"),
    ],
    ids=["missing", "some integers", "some tabs", "blank", "binary"],
)
def test_a_wrong_list_is_explained(root, content, message):
    path = root / "folders" / "list.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{message}.*--data\.root") as raised:
        open_source(path)
    assert "\n" not in str(raised.value)


def test_a_changed_list_over_the_same_files_gives_the_new_labels(root):
    assert open_source(root / "tabs.txt").labels.tolist() == [0, 0, 1, 1]
    (root / "tabs.txt").write_text((root / "tabs.txt").read_text().replace("1.png\tcat", "1.png\tdog"))
    assert open_source(root / "tabs.txt").labels.tolist() == [1, 0, 1, 1]
    (root / "tabs.txt").write_text("folders/dog/1.png\n")
    source = open_source(root / "tabs.txt")
    assert (source.labels.tolist(), source.heights.tolist()) == ([-1], [30])


def test_an_unreadable_folder_is_named(root, monkeypatch):
    scandir = open_source.__globals__["os"].scandir

    def denied(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", denied)
    with pytest.raises(DataError, match=r"dog/deep cannot be read \(Permission denied\); check --data\.root"):
        open_source(root / "folders")


def many(root):
    """One source of every kind, 12 images each."""
    content = {}
    for value in range(12):
        path = root / f"class{value % 3}" / f"{value}.png"
        write(path, value, 20 + value, 40 - value)
        content[f"class{value % 3}/{value}.png"] = path.read_bytes()
    shards = root.parent / "shards"
    shards.mkdir()
    for part in range(3):
        with tarfile.open(shards / f"{part}.tar", "w") as archive:
            for name in list(content)[part::3]:
                info = tarfile.TarInfo(name)
                info.size = len(content[name])
                archive.addfile(info, io.BytesIO(content[name]))
    (root.parent / "list.txt").write_text("".join(f"{root}/{name}\t{name[:6]}\n" for name in content))
    images = np.random.default_rng(0).integers(0, 256, (12, 24, 24, 3), dtype=np.uint8)
    folder, array = ImageFolder(root), ArraySource("array", images, np.arange(12) % 3, ("a", "b", "c"))
    return {
        "folder": folder,
        "unlabeled": ImageFolder(root, labeled=False),
        "shards": TarShards(shards),
        "list": ListedImages(root.parent / "list.txt"),
        "array": array,
        "subset": Subset(JointSource(folder, array), np.arange(0, 24, 2)),
        "joint": JointSource(Subset(array, np.arange(4)), Subset(folder, np.arange(8))),
    }


def crops_by_id(source, world_size, first_step=0):
    """Ids and uint8 crops of all ranks in order, for every step of two epochs with global batch 4."""
    result = []
    for step in range(first_step, 6):
        ids, crops = [], []
        for rank in range(world_size):
            # Every rank and every restart has its own copy, like another process
            executor = build_executor(
                "torchvision", pickle.loads(pickle.dumps(source)), mean=(0, 0, 0), std=(1, 1, 1), workers=0
            )
            plan = SamplePlan(
                widths=source.widths,
                heights=source.heights,
                labels=source.labels,
                views=[ViewSpec(size=8), ViewSpec(size=6)],
                seed=3,
            )
            part = TrainSampler(plan, batch_size=4 // world_size, rank=rank, world_size=world_size)[step]
            ids += part.ids.tolist()
            crops.append(executor.crops(part))
        result.append((ids, [torch.cat(views) for views in zip(*crops, strict=True)]))
    return result


@pytest.mark.parametrize("kind", ["folder", "unlabeled", "shards", "list", "array", "subset", "joint"])
def test_ranks_and_restarts_see_the_same_images(tmp_path, kind):
    source = many(tmp_path / "data")[kind]
    expected = crops_by_id(source, 1)
    assert sorted(number for ids, _ in expected[:3] for number in ids) == list(range(12))
    for world_size, first_step in ((2, 0), (4, 0), (1, 2), (2, 5)):
        for (ids, crops), (same_ids, same_crops) in zip(
            crops_by_id(source, world_size, first_step), expected[first_step:], strict=True
        ):
            assert ids == same_ids
            assert all(torch.equal(one, other) for one, other in zip(crops, same_crops, strict=True))


def test_folder_and_list_are_the_same_data(tmp_path):
    sources = many(tmp_path / "data")
    folder, listed, sharded = (sources[kind] for kind in ("folder", "list", "shards"))
    by_name = {folder.describe(i): i for i in range(12)}
    for i in range(12):
        assert folder.encoded(by_name[listed.describe(i)]) == listed.encoded(i)
        name = sharded.name_of(i).split("/", 1)[1]
        assert folder.encoded(by_name[f"{tmp_path}/data/{name}"]) == sharded.encoded(i)
        assert sharded.classes[sharded.labels[i]] == name[:6]


def test_worker_processes_read_shards(tmp_path):
    source = many(tmp_path / "data")["shards"]
    plan = SamplePlan(
        widths=source.widths, heights=source.heights, labels=source.labels, views=[ViewSpec(size=8)], seed=0
    )
    steps = TrainSampler(plan, batch_size=4)
    streams = [
        build_executor("torchvision", source, mean=(0, 0, 0), std=(1, 1, 1), workers=workers).stream(steps, 0, 3)
        for workers in (0, 1)
    ]
    for one, other in zip(*streams, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert torch.equal(one.views[0], other.views[0])
