"""How installing pagedkv builds its native kernels: one shared library per instruction set, with whatever C++ compiler there is.

Used by setuptools alone, while a wheel or an editable install is made; nothing of the package imports it. Where nothing can be compiled
the installation goes on without, and attention on the CPU falls back to torch.
"""

from __future__ import annotations

import importlib.util
import logging
import platform
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

_NATIVE = Path(__file__).parent / "attention" / "native"
_FLAGS = ("-std=c++17", "-O3", "-g0", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
_OPENMP = "-fopenmp"


def _library() -> ModuleType:
    """``library.py`` by its path: its package would bring torch, which need not be there to build."""
    spec = importlib.util.spec_from_file_location("pagedkv_native_library", _NATIVE / "library.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class BuildKernels(build_ext):  # type: ignore[misc]
    """Builds the declared library once per instruction set that this kind of processor can have."""

    def finalize_options(self) -> None:
        """Put one extension per build in the place of the declared one."""
        super().finalize_options()
        self._builds = {f"pagedkv.attention.native.{build.path.stem}": build for build in _library().BUILDS}
        declared: list[Extension] = self.extensions
        sources = declared[0].sources if declared else []
        self.extensions: list[Extension] = [
            Extension(name, sources, depends=[str(path) for path in _NATIVE.glob("src/*.h")], language="c++", optional=True)
            for name, build in self._builds.items()
            if not build.machines or platform.machine() in build.machines
        ]
        for extension in self.extensions:  # what the parent's own finalize_options does for those it was given
            extension._full_name = extension.name
            extension._links_to_dynamic = extension._needs_stub = False
            extension._file_name = self.get_ext_filename(extension.name)

    def get_ext_filename(self, ext_name: str) -> str:
        """``libpagedkv_avx2.so``: no interpreter's tag, since no interpreter's headers are used."""
        return str(Path(*ext_name.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one build, without threads where the compiler has no OpenMP."""
        flags = [*_FLAGS, *self._builds[ext.name].flags]
        try:
            self._compile(ext, [*flags, _OPENMP])
        except (CompileError, LinkError):
            logging.getLogger(__name__).warning("%s: no OpenMP, so this build uses one thread", ext.name)
            self._compile(ext, flags)

    def _compile(self, ext: Extension, flags: list[str]) -> None:
        folder = str(Path(self.build_temp) / ext.name)  # the builds share a source: each has objects of its own
        objects = self.compiler.compile(ext.sources, output_dir=folder, extra_postargs=flags)
        link = [_OPENMP] if _OPENMP in flags else []
        self.compiler.link_shared_object(objects, self.get_ext_fullpath(ext.name), extra_postargs=link, target_lang="c++")


class PlatformWheel(bdist_wheel):  # type: ignore[misc]
    """One wheel for every Python of a platform: the libraries have a plain C interface."""

    def get_tag(self) -> tuple[str, str, str]:
        """``py3-none-<platform>``."""
        tag: tuple[Any, ...] = super().get_tag()
        return "py3", "none", str(tag[2])
