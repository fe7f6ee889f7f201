"""Table in the README: differences of each executor's pixels from Pillow's crop and resize, in gray levels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resized_crop

from fastssl_pipelines import ImageFolder, ViewSpec, available_executors, build_executor
from fastssl_pipelines.executors.resident import _crops_in_batches
from fastssl_pipelines.synthetic.photos import write_photographs
from tests.pipelines.photos import NORMALIZATION, plan_of

COUNT = 24
VIEWS = (ViewSpec(size=224), ViewSpec(size=96, scale=(0.05, 0.2)), ViewSpec(size=32))
# Mean, maximum, and maximum without an eighth of the view at each border
TOLERANCES = {
    "torchvision": (0.1, 2, 2),
    "dali on a CPU": (0.1, 2, 2),
    "resident on a CPU": (0.1, 2, 2),
    "resident on a GPU": (0.25, 1, 1),
    "dali on a GPU": (0.3, 16, 1),
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> ImageFolder:
    folder = tmp_path_factory.mktemp("photographs")
    write_photographs(folder, COUNT, seed=0, workers=1)
    return ImageFolder(folder)


@pytest.fixture(scope="module")
def truth(photographs) -> list[torch.Tensor]:
    plan = plan_of(photographs, *VIEWS).batch(0, 0, COUNT)
    images = [Image.fromarray(photographs.pixels(int(index))) for index in plan.ids]
    return [
        torch.from_numpy(
            np.stack(
                [
                    resized_crop(image, *box, [view.size] * 2, InterpolationMode.BILINEAR)
                    for image, box in zip(images, view.boxes.tolist(), strict=True)
                ]
            )
        )
        for view in plan.views
    ]


def crops_of(name: str, source: ImageFolder) -> tuple[torch.Tensor, ...]:
    plan = plan_of(source, *VIEWS).batch(0, 0, COUNT)
    if reason := available_executors()[name.split()[0]]:
        pytest.skip(reason)
    executor = build_executor(name.split()[0], source, workers=0, **NORMALIZATION)
    if not name.endswith("GPU"):
        return executor.crops(plan)
    # The code for a GPU, run on a CPU
    if name.startswith("resident"):
        return _crops_in_batches(executor._images.transpose(2, 3).contiguous(), torch.device("cpu"), plan)
    from fastssl_pipelines.executors.dali_graph import Decoder

    decoder = Decoder(tuple(view.size for view in VIEWS), COUNT, threads=1, device=None, decode="cpu")
    encoded = [np.frombuffer(source.encoded(int(index)), np.uint8) for index in plan.ids]
    outputs = decoder.run(encoded, [view.boxes for view in plan.views])
    return tuple(torch.from_dlpack(output.as_tensor()) for output in outputs)


@pytest.mark.parametrize("name", TOLERANCES)
def test_pixels_are_pillows_within_the_tolerance(name, photographs, truth):
    for crops, expected in zip(crops_of(name, photographs), truth, strict=True):
        levels = (crops.int() - expected.int()).abs()
        margin = crops.shape[1] // 8
        inside = levels[:, margin:-margin, margin:-margin]
        most_mean, most, most_inside = TOLERANCES[name]
        assert levels.float().mean() < most_mean
        assert levels.max() <= most
        assert inside.max() <= most_inside
