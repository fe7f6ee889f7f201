"""The methods, by name. A new one is a file and a line here."""

from fastssl.methods.base import Method, MethodConfig, MethodOutput, TrainProgress
from fastssl.methods.co2 import CO2
from fastssl.methods.mixco import MixCo
from fastssl.methods.moco import MoCoV1, MoCoV2
from fastssl.methods.msvq import MSVQ
from fastssl.methods.ressl import ReSSL
from fastssl.methods.smog import SMoG
from fastssl.methods.sup_con import SupCon
from fastssl.methods.unimoco import UniMoCo
from fastssl.methods.unmix import UnMix

METHODS: dict[str, type[Method]] = {
    cls.Config.name: cls for cls in (MoCoV1, MoCoV2, UniMoCo, SupCon, MixCo, UnMix, CO2, ReSSL, MSVQ, SMoG)
}

__all__ = ["METHODS", "Method", "MethodConfig", "MethodOutput", "TrainProgress"]
