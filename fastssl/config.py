"""The configuration of a run: frozen, checked on construction, saved in the run folder and read back."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from fastssl.arguments import Suppress
from fastssl.errors import ConfigError
from fastssl.methods import METHODS, MethodConfig
from fastssl.renamed import current_names
from fastssl.validation import (
    Checked,
    Count,
    Decay,
    Images,
    Range,
    Rate,
    Seconds,
    Share,
    Temperature,
    Weight,
    build,
    refused,
    require,
)
from fastssl_pipelines.views import ViewSpec

FORMAT = 2
"""Of config.json; format 1 had no such entry and earlier names of some options."""
_Deviation = Annotated[float, Range(least=0.001, most=1)]


@dataclass(frozen=True, kw_only=True)
class RunConfig(Checked, prefix="--run."):
    dir: Path | None = None
    """Run folder; by default runs/<preset>-<date>."""
    tensorboard: bool = False
    """Also write the values of metrics.jsonl for TensorBoard, into the folder `tensorboard` of the run."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Checked, prefix="--data."):
    root: Path | None = None
    """Images: a folder of class folders, of .tar shards or of images, a .tar file, or a text file of paths; or a folder
    with train and val (or test) in one of these forms."""
    dataset: Literal["CIFAR10", "CIFAR100", "STL10", "FashionMNIST"] | None = None
    """Data set of torchvision by name; root is then the folder where torchvision stores it."""
    download: bool = False
    """Download the named data set if its files are missing."""
    pictures: Annotated[int, Range(least=0, most=10**6)] = 0
    """Procedural pictures to train on if no root is given; 0 requires a root."""
    pipeline: Literal["auto", "dali", "torchvision", "resident"] = "auto"
    """Implementation that decodes, crops and resizes; auto keeps small data sets decoded in memory."""
    label_fraction: Share = 1.0
    """Share of each class whose labels the method may see, 0 to 1."""
    label_list: Path | None = None
    """Text file of base names (or class/name), one per line: the method may only see the labels of these images."""
    unlabeled: Path | None = None
    """Unlabeled images to train on in addition to root: a folder (any depth), .tar shards or a list of paths."""
    quarantine: Path | None = None
    """Text file of image names (class/name or base name), one per line: images to ignore everywhere."""
    decode: Literal["auto", "gpu", "gpu-region", "cpu", "cpu-region"] = "auto"
    """Where the dali pipeline decodes for a GPU; -region: only the part that the views need; auto measures."""
    workers: Annotated[int, Range(least=0, most=1024)] | None = None
    """Processes that decode for the torchvision pipeline, or threads for the others; by default all but one core, at
    most 12, for a GPU, and a quarter of the cores, at least 2, for a CPU."""
    prefetch: Annotated[int, Range(least=1, most=256)] = 2
    """Batches to prepare ahead."""
    resident_gib: Annotated[float, Range(least=0, most=10**6)] = 2.0
    """Largest decoded data set that the auto pipeline keeps in memory."""
    mean: tuple[Share, Share, Share] = (0.485, 0.456, 0.406)
    """Channel means for normalization, in units of the [0, 1] range."""
    std: tuple[_Deviation, _Deviation, _Deviation] = (0.229, 0.224, 0.225)
    """Channel standard deviations for normalization."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_list is not None and self.label_fraction < 1:
            raise ConfigError(
                f"--data.label-list {self.label_list} was given with a label fraction of {self.label_fraction}; the "
                "list alone decides which labels are known: add --data.label-fraction 1 or drop the list"
            )
        for name in ("label_list", "unlabeled", "quarantine"):
            path, option = getattr(self, name), name.replace("_", "-")
            if path is not None and self.root is None:
                raise ConfigError(f"--data.{option} {path} was given without labeled images; add --data.root DIR")
        if self.dataset is not None and self.root is None:
            raise ConfigError(
                f"--data.dataset {self.dataset} was given without a folder; name the one that torchvision keeps it in "
                "with --data.root DIR"
            )
        if self.download and self.dataset is None:
            raise ConfigError("--data.download was given without a name; add --data.dataset NAME or drop it")

    def absolute(self) -> DataConfig:
        """A copy with absolute paths, for a run that is resumed from another folder."""
        given = {name: getattr(self, name) for name in ("root", "label_list", "unlabeled", "quarantine")}
        paths: dict[str, Any] = {name: path.absolute() for name, path in given.items() if path is not None}
        return dataclasses.replace(self, **paths)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked, prefix="--model."):
    encoder: str = "resnet50"
    """torchvision ResNet by name, timm/<model>, or the name of a plug-in's encoder."""
    width: Annotated[float, Range(above=0, most=16)] = 1.0
    """Factor of the channels of every stage of a ResNet."""
    stem: Literal["imagenet", "small", "small-pool"] = "imagenet"
    """First layer: 7x7 stride 2 and max-pool, or 3x3 stride 1 without or with max-pool."""
    norm: Literal["local", "split", "sync", "group", "apex-group"] = "split"
    """Batch norm over a device's part of the batch, over `splits` groups of the batch, or over all devices; or group
    norm of torch or of NVIDIA apex."""
    splits: Annotated[int, Range(least=1, most=2**16)] = 8
    """Groups of split batch norm on all devices together: 8 on one device reproduce 8 devices."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Checked, prefix="--optim."):
    optimizer: Literal["sgd", "lars", "adamw", "lamb", "novograd"] = "sgd"
    """SGD with momentum; LARS, with one rate per parameter tensor, for large batches; AdamW; LAMB and NovoGrad, which
    need apex."""
    impl: Literal["torch", "apex"] = "torch"
    """Implementation: torch's fused optimizers (LARS: ours), or those of NVIDIA apex, if it is installed."""
    lr: Rate = 0.03
    """Learning rate after the warm-up, for the batch size as given (it is not rescaled)."""
    momentum: Decay = 0.9
    """Momentum of SGD and LARS."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of the averages of the gradient and its square in AdamW, LAMB and NovoGrad."""
    weight_decay: Weight = 1e-4
    """Weight decay, on all parameters as in the official MoCo code."""
    decay_norm_and_bias: bool = True
    """Also apply weight decay to batch norm and biases."""
    trust: Annotated[float, Range(above=0, most=1000)] = 0.001
    """Size of a LARS step in units of the parameter's norm, at learning rate 1."""
    clip_norm: Rate | None = None
    """Largest norm of the gradient; longer ones are scaled down to it. By default no limit."""
    schedule: Literal["cosine", "cosine-epoch", "step"] = "cosine"
    """Cosine per step, cosine per epoch (official MoCo), or a factor of 0.1 at each milestone."""
    final_lr: Annotated[float, Range(least=0)] = 0.0
    """Learning rate at the end of the cosine."""
    milestones: tuple[Count, ...] = (120, 160)
    """Epochs of the step schedule."""
    warmup_epochs: Annotated[int, Range(least=0, most=10**12)] = 0
    """Epochs of linear warm-up from `warmup_lr` to `lr`."""
    warmup_lr: Annotated[float, Range(least=0)] = 0.0
    """Learning rate at the start of the warm-up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, value in (("--optim.final-lr", self.final_lr), ("--optim.warmup-lr", self.warmup_lr)):
            require(value <= self.lr, option, value, f"in [0, {self.lr}], as --optim.lr is {self.lr}")
        ascending = all(one <= other for one, other in itertools.pairwise(self.milestones))
        require(ascending, "--optim.milestones", self.milestones, "in ascending order")
        if self.impl == "apex" and self.optimizer == "lars":
            raise ConfigError(
                "--optim.impl apex was given with --optim.optimizer lars, which is our own: drop one of them"
            )
        if self.impl == "torch" and self.optimizer in ("lamb", "novograd"):
            raise ConfigError(
                f"--optim.optimizer {self.optimizer} was given; NVIDIA apex has it: add --optim.impl apex"
            )
        cosine = self.schedule != "step"
        require(cosine or self.final_lr == 0, "--optim.final-lr", self.final_lr, "0 with --optim.schedule step")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Checked, prefix="--train."):
    epochs: Count = 200
    """Passes over the training images."""
    steps: Count | None = None
    """Total number of steps; overrides epochs."""
    batch_size: Images = 256
    """Images per step, on all devices together."""
    accumulate: Images = 1
    """Parts into which each device splits its share of a step, to save memory (gradient accumulation)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """bf16 autocast; fp16 autocast with a scaled loss; fp32, on a GPU with exact or with TF32 products. auto is bf16
    if the device supports it, else fp16 on a GPU that is fast in it, else fp32."""
    deterministic: bool = False
    """Use only algorithms that give the same bits in every run: slower ones on a GPU; on a CPU a fixed number of
    threads (as with OMP_NUM_THREADS) instead of as many as help."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the method; auto is on for CUDA and off for a CPU, where it gained nothing in measurements."""
    cuda_graph: bool = False
    """Capture the whole step as one CUDA graph, which saves launches; only for a single GPU."""
    non_finite: Literal["stop", "skip"] = "stop"
    """If loss or gradient is not finite: stop, or go back to the last checkpoint and skip that step."""
    log_every: Count = 20
    """Steps between progress lines."""
    checkpoint_every: Count = 200
    """Steps between checkpoints, which are also written at the start, at the end and when stopped."""
    keep_checkpoints: Count = 2
    """Number of newest checkpoints to keep."""
    keep_every: Count | None = None
    """Steps between checkpoints that are never deleted, a multiple of checkpoint_every."""
    timeout_s: Seconds = 600.0
    """Seconds to wait for other devices or for a batch before the run ends with an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        every = self.checkpoint_every
        whole = self.keep_every is None or self.keep_every % every == 0
        require(whole, "--train.keep-every", self.keep_every, f"a multiple of --train.checkpoint-every {every}")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Checked, prefix="--eval."):
    every_epochs: Count = 40
    """Epochs between kNN evaluations, each of which costs about a quarter of an epoch; there is also one before and one
    after training."""
    k: Count = 200
    """Neighbors that vote."""
    temperature: Temperature = 0.1
    """Temperature of the votes."""


@dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """Pretrain an image encoder; every option below has the preset's value as its default."""

    seed: Annotated[int, Range(least=0, below=2**63)] = 0
    """All randomness of the run follows from it."""
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    preset: Annotated[str, Suppress] = "custom"
    views: Annotated[tuple[ViewSpec, ...], Suppress]
    odd_views: Annotated[tuple[ViewSpec, ...], Suppress] = ()
    """Views of odd steps, if they differ; the two view sets of SMoG swap roles at every step."""
    eval_view: Annotated[ViewSpec, Suppress]

    def __post_init__(self) -> None:
        super().__post_init__()
        # It is part of the name of a run folder
        named = re.fullmatch(r"[\w.+ -]{1,100}", self.preset) is not None
        require(named, "preset", self.preset, "at most 100 letters, digits, dots, dashes or spaces")
        batch, splits = self.train.batch_size, self.model.splits
        self.method.check_batch(batch)
        multiple = splits * self.method.batch_multiple
        if self.model.norm == "split" and batch % multiple:
            raise ConfigError(
                f"--train.batch-size {batch} was given with --model.splits {splits}; split batch norm needs a batch "
                f"that is a multiple of {multiple} for {self.method.name}: change one of them or use "
                "--model.norm local"
            )
        groups = {"split": splits, "local": self.train.accumulate, "sync": self.train.accumulate}
        if batch < 2 * groups.get(self.model.norm, 0):
            raise ConfigError(
                f"--train.batch-size {batch} was given with --model.norm {self.model.norm}, --model.splits {splits} "
                f"and --train.accumulate {self.train.accumulate}; batch norm needs 2 images or more in each of its "
                "groups: raise the batch size, lower the others or use --model.norm group"
            )
        if self.train.accumulate > 1 and self.method.whole_batch:
            raise ConfigError(
                f"--train.accumulate {self.train.accumulate} was given with {self.method.name}, whose loss needs all "
                "images of a step at once; it must be 1"
            )
        METHODS[self.method.name].check_views(self.views)
        if self.odd_views and [view.size for view in self.odd_views] != [view.size for view in self.views]:
            raise ConfigError("the views of odd steps must be as many and as large as the others; change the preset")


def to_json(config: Config) -> str:
    """The resolved configuration as JSON text, for `from_json`."""
    values = dataclasses.asdict(config)
    values["method"] = {"name": config.method.name, **values["method"]}
    return json.dumps({"format": FORMAT, **values}, indent=2, default=str)


def from_json(text: str) -> Config:
    """Read the configuration that `to_json` wrote; ConfigError for any other text."""
    try:
        values = _in_this_format(_parsed(text))
        values.pop("identity", None)  # What the run recorded about itself
        if "method" in values:
            values["method"] = _method(values["method"])
        return build(Config, values)
    except RecursionError:
        raise ConfigError("the configuration is nested too deeply; give the file as fastssl wrote it") from None


def _method(values: Any) -> MethodConfig:
    if not isinstance(values, dict):
        raise refused("method", values, "an object with the name and the options of a method")
    options = {key: value for key, value in values.items() if key != "name"}
    name = values.get("name")
    if not isinstance(name, str):
        raise refused("method.name", name, "the name of a method")
    return build(METHODS.find(name).Config, options, "method")


def _in_this_format(values: dict[str, Any]) -> dict[str, Any]:
    written = values.pop("format", 1)
    if type(written) is not int or not 1 <= written <= FORMAT:
        raise refused("format", written, f"1 to {FORMAT}, unless a newer fastssl reads the file")
    values = current_names(values) if written == 1 else values
    if written == 1 and isinstance(values.get("method"), dict):
        values["method"].setdefault("queue_dtype", "fp32")  # What runs did before this option existed
    return values


def _parsed(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_no_number)
    except ValueError as error:
        raise ConfigError(f"the configuration is not valid JSON ({error}); give the file as fastssl wrote it") from None
    if not isinstance(values, dict):
        raise ConfigError("the configuration is not a JSON object; give the file as fastssl wrote it")
    return values


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} appears twice")
    return values


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not a number")
