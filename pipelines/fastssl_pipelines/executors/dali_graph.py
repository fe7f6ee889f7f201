"""DALI pipeline: decodes each image once and, on a GPU, crops and resizes every view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn
from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType

Boxes = NDArray[np.int32]  # [B, 4]: top, left, height, width in pixels


class Decoder:
    """DALI pipeline for up to `batch_size` images; unusable after an error.

    `sizes`: side of each view, which the pipeline crops and resizes; () for the decoded images themselves.
    `decode`: "gpu" or "cpu"; with the suffix "-region", only a part of each image is decoded. `device`: index of the
    GPU that does everything else, or None.
    """

    def __init__(
        self, sizes: tuple[int, ...], batch_size: int, *, threads: int, device: int | None, decode: str
    ) -> None:
        self.sizes, self.batch_size = sizes, batch_size
        self._region = decode.endswith("-region")
        self._pipeline = Pipeline(
            batch_size=batch_size,
            num_threads=threads,
            device_id=device,
            prefetch_queue_depth=1,  # The inputs of a run cannot be prefetched
        )
        how: dict[str, Any] = {"device": "mixed" if decode.startswith("gpu") else "cpu"}
        how |= {"output_type": DALIImageType.RGB, "adjust_orientation": False}
        with self._pipeline:
            encoded = _fed("encoded", DALIDataType.UINT8)
            if self._region:
                images = fn.decoders.image_slice(encoded, **_window("region"), **how)
            else:
                images = fn.decoders.image(encoded, **how)
            if device is not None:
                images = images.gpu()
            self._pipeline.set_outputs(*[_resized(images, view, size) for view, size in enumerate(sizes)] or [images])
        self._pipeline.build()

    def run(self, encoded: Sequence[NDArray[np.uint8]], boxes: Sequence[Boxes]) -> Sequence[Any]:
        """Decode JPEG or PNG files: a tensor list for each view, or one of images; `boxes` refer to whole images.

        RuntimeError for a file that DALI cannot decode.
        """
        inputs: dict[str, Any] = {"encoded": list(encoded)}
        if self._region:
            region = region_of(boxes)
            boxes = [within(region, box) for box in boxes]
            inputs |= _corners("region", region)
        for view in range(len(self.sizes)):
            inputs |= _corners(f"view_{view}", boxes[view])
        # DALI reads these arrays in place while it runs; a copy would block the interpreter for 10 ms and more
        self._fed = inputs
        return self._pipeline.run(**inputs)


def region_of(boxes: Sequence[Boxes]) -> Boxes:
    """Bounding box of all views of each image."""
    corners = np.stack(boxes)
    start = corners[:, :, :2].min(0)
    stop = (corners[:, :, :2] + corners[:, :, 2:]).max(0)
    return np.concatenate([start, stop - start], axis=1)


def within(region: Boxes, boxes: Boxes) -> Boxes:
    """`boxes` relative to the corner of `region`."""
    return np.concatenate([boxes[:, :2] - region[:, :2], boxes[:, 2:]], axis=1)


def _resized(images: Any, view: int, size: int) -> Any:
    # The region of interest of fn.resize would let the filter see the pixels around it
    cut = fn.slice(images, **_window(f"view_{view}"))
    return fn.resize(cut, size=[size, size], interp_type=DALIInterpType.INTERP_LINEAR, antialias=True)


def _window(name: str) -> dict[str, Any]:
    ends = (f"{name}_start", f"{name}_shape")
    start, shape = (_fed(end, DALIDataType.INT32) for end in ends)
    return {"start": start, "shape": shape, "axes": (0, 1)}


def _fed(name: str, dtype: DALIDataType) -> Any:
    """One-dimensional input that `run` feeds for each image under this name."""
    return fn.external_source(name=name, dtype=dtype, ndim=1, no_copy=True)


def _corners(name: str, boxes: Boxes) -> dict[str, NDArray[np.int32]]:
    halves = {f"{name}_start": boxes[:, :2], f"{name}_shape": boxes[:, 2:]}
    return {end: np.ascontiguousarray(half) for end, half in halves.items()}  # A list of rows takes 20 times as long
