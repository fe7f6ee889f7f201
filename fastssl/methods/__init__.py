"""The methods, by name. A new one is a file and a line here."""

from fastssl.methods.base import Method, MethodConfig, MethodOutput
from fastssl.methods.moco import MoCoV1, MoCoV2
from fastssl.methods.unimoco import UniMoCo

METHODS: dict[str, type[Method]] = {cls.Config.name: cls for cls in (MoCoV1, MoCoV2, UniMoCo)}

__all__ = ["METHODS", "Method", "MethodConfig", "MethodOutput"]
