"""`fastssl preview`: draw the views of a training step with their augmentation parameters."""

from __future__ import annotations

import io
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fastssl.arguments import parse_known
from fastssl.commands.pretrain import parse
from fastssl.config import Config, DataConfig
from fastssl.data import open_splits
from fastssl.device import choose_device
from fastssl.errors import ConfigError
from fastssl.executor import input_executor
from fastssl.observe.notes import NoteQueue
from fastssl.train.build import train_sampler
from fastssl.validation import Checked, Images, Range
from fastssl_pipelines.errors import UnreadableImages
from fastssl_pipelines.executors.base import Executor
from fastssl_pipelines.names import printable
from fastssl_pipelines.plan import BatchPlan, ViewPlan
from fastssl_pipelines.sampler import TrainSampler
from fastssl_pipelines.sources.base import Source

_SIDE_AT_LEAST = 160  # Pixels of a view in the picture, so that its caption fits below
_GAP, _LINE, _FONT_SIZE = 10, 15, 12
_INK, _PAPER = "#202020", "#ffffff"
_COLORS = (
    "#e6194b",
    "#0082c8",
    "#3cb44b",
    "#f58231",
    "#911eb4",
    "#00a5a5",
    "#f032e6",
    "#808000",
    "#9a6324",
    "#000075",
)
_JITTER = ("brightness", "contrast", "saturation", "hue")  # By index in ViewPlan.order


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Draws the views of a training step; accepts all options of `fastssl pretrain`."""

    images: Images = 8
    """number of rows: the first images of the step's batch"""
    step: Annotated[int, Range(least=0)] = 0
    """training step"""
    out: Path = Path("preview.png")
    """PNG file to write"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out.suffix.lower() != ".png" or not self.out.parent.is_dir():
            raise ConfigError(f"--out {self.out} was given; it must be the name of a .png file in an existing folder")


def main(arguments: list[str]) -> int:
    """`fastssl preview [PRESET | --config FILE] [--images N] [--step N] [--out FILE] [--section.field VALUE ...]`."""
    options, rest = parse_known(Options, arguments, prog="fastssl preview")
    return run(parse(rest), options)


@dataclass(frozen=True, slots=True)
class _Tile:
    """Picture with lines of text below it."""

    picture: Image.Image
    lines: list[str]


def run(config: Config, options: Options) -> int:
    """Write the picture: one row per image, first the source with the boxes of all views, then the views."""
    with NoteQueue() as notes:
        source = open_splits(config).train
        steps = train_sampler(config, source)
    for note in notes.take():
        print(f"warning: {note}", file=sys.stderr)
    total = config.train.steps or config.train.epochs * steps.steps_per_epoch
    if options.step >= total:
        raise ConfigError(f"--step {options.step} was given; the run has {total} steps, counted from 0")
    if options.images > steps.batch_size:
        raise ConfigError(f"--images {options.images} was given; a step has {steps.batch_size} (--train.batch-size)")
    executor = input_executor(config.data, source, device=choose_device(config.train), dtype=torch.float32)
    plan, views = _step(executor, steps, options.step, options.images)
    rows = [_row(source, config.data, plan, views, row) for row in range(options.images)]
    titles = ["source", *(f"view {number} ({view.size} px)" for number, view in enumerate(plan.views, 1))]
    heading = (
        f"{config.preset}, step {options.step} of {total}, seed {config.seed}: {options.images} of the"
        f" {steps.batch_size} images, {executor.name} pipeline"
    )
    _write(options.out, _grid(heading, titles, rows))
    print(printable(str(options.out)))
    return 0


def _step(
    executor: Executor, steps: TrainSampler, step: int, images: int
) -> tuple[BatchPlan, tuple[torch.Tensor, ...]]:
    """Plan and views of the first images of a step; unreadable images are replaced as in training."""
    unreadable = np.zeros(len(executor.source), np.bool_)
    unreadable[list(executor.unreadable)] = True
    while True:
        plan = steps.at(step, unreadable).rows(0, images)
        try:
            return plan, executor.batch(plan, step).views
        except UnreadableImages as error:
            found = list(error.reasons)
            if unreadable[found].all():  # No readable image is left
                raise
            unreadable[found] = True


def _row(source: Source, data: DataConfig, plan: BatchPlan, views: tuple[torch.Tensor, ...], row: int) -> list[_Tile]:
    index = int(plan.ids[row])
    height = max(view.size * _enlargement(view.size) for view in plan.views)
    picture = _with_boxes(source.pixels(index), [view.boxes[row] for view in plan.views], height)
    label = int(source.labels[index])
    lines = [
        printable(Path(source.describe(index)).name),
        f"{source.widths[index]} x {source.heights[index]} px",
        *([printable(source.classes[label])] if label >= 0 else []),
        *(["in place of an unreadable image"] if plan.replaced[row] else []),
    ]
    tiles = [
        _Tile(_as_picture(view[row], data), caption(view_plan, row))
        for view, view_plan in zip(views, plan.views, strict=True)
    ]
    return [_Tile(picture, lines), *tiles]


def caption(view: ViewPlan, row: int) -> list[str]:
    """Parameters of one view of one image in the order of application, without those that have no effect.

    The flip comes last, since `augment` applies it to the finished colors.
    """
    top, left, height, width = view.boxes[row].tolist()
    lines = [f"top {top}, left {left}", f"height {height}, width {width}"]
    for operation in view.order[row].tolist():
        name = _JITTER[operation]
        value = float(getattr(view, name)[row])
        if value != (0 if name == "hue" else 1):
            lines.append(f"{name} {value:+.3f}" if name == "hue" else f"{name} {value:.3f}")
    lines += ["gray"] if view.grayscale[row] else []
    lines += [f"blur sigma {view.blur_sigma[row]:.2f}"] if view.blur_sigma[row] else []
    lines += ["solarize"] if view.solarize[row] else []
    return lines + (["flip"] if view.flip[row] else [])


def _enlargement(side: int) -> int:
    return max(1, math.ceil(_SIDE_AT_LEAST / side))


def _as_picture(view: torch.Tensor, data: DataConfig) -> Image.Image:
    """Undo the normalization of a view [3, H, W], and enlarge a small one."""
    levels = (view.permute(1, 2, 0).float().cpu().numpy() * data.std + data.mean) * 255
    picture = Image.fromarray(np.rint(levels).clip(0, 255).astype(np.uint8))
    factor = _enlargement(picture.width)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _with_boxes(pixels: NDArray[np.uint8], boxes: list[NDArray[np.int32]], height: int) -> Image.Image:
    """Source image, at most `height` high and 1.5 times that wide, with the box of every view in its color."""
    picture = Image.fromarray(pixels)
    scale = min(height / picture.height, 1.5 * height / picture.width)
    if scale >= 1:
        scale = int(scale)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    picture = picture.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(picture)
    for index, box in enumerate(boxes):
        top, left, box_height, box_width = (scale * box).tolist()
        corners = (left, top, max(left, left + box_width - 1), max(top, top + box_height - 1))
        draw.rectangle(corners, outline=_COLORS[index % len(_COLORS)], width=2)
    return picture


def _grid(heading: str, titles: list[str], rows: list[list[_Tile]]) -> Image.Image:
    font = ImageFont.load_default(_FONT_SIZE)
    widths = [max(_SIDE_AT_LEAST, *(row[column].picture.width for row in rows)) for column in range(len(titles))]
    heights = [max(tile.picture.height + _LINE * len(tile.lines) for tile in row) + 2 * _GAP for row in rows]
    lefts = [_GAP + sum(widths[:column]) + _GAP * column for column in range(len(titles))]
    top = 2 * _GAP + 2 * _LINE
    page = Image.new("RGB", (lefts[-1] + widths[-1] + _GAP, top + sum(heights)), _PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((_GAP, _GAP), heading, _INK, font)
    for column, title in enumerate(titles):
        color = _COLORS[(column - 1) % len(_COLORS)] if column else _INK
        draw.text((lefts[column], _GAP + _LINE), _fitting(title, font, widths[column]), color, font)
    for row, height in zip(rows, heights, strict=True):
        for tile, left, width in zip(row, lefts, widths, strict=True):
            page.paste(tile.picture, (left, top))
            for number, line in enumerate(tile.lines):
                place = (left, top + tile.picture.height + 2 + _LINE * number)
                draw.text(place, _fitting(line, font, width), _INK, font)
        top += height
    return page


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, or three dots and as much of its end as fits."""
    if font.getlength(text) <= width:
        return text
    return next(short for start in range(1, len(text) + 1) if font.getlength(short := "..." + text[start:]) <= width)


def _write(path: Path, page: Image.Image) -> None:
    file = io.BytesIO()
    page.save(file, "PNG")
    try:
        path.write_bytes(file.getvalue())
    except OSError as error:
        raise ConfigError(f"--out {path} could not be written ({error.strerror}); give another file") from None
