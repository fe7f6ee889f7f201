"""The methods by name; every file of this folder is imported, so that its methods register themselves."""

from importlib import import_module
from pkgutil import iter_modules

from fastssl.methods.base import METHODS, Method, MethodConfig, MethodOutput, TrainProgress, register_method

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")

__all__ = ["METHODS", "Method", "MethodConfig", "MethodOutput", "TrainProgress", "register_method"]
