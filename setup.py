"""The CUDA extension, where it can be built; see `csrc/build.py`. All else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))
import build as cuda


class BuildCuda(build_ext):
    """Leaves the work to `csrc/build.py`; the file name carries no Python version."""

    def build_extension(self, ext):
        cuda.build(Path(self.get_ext_fullpath(ext.name)).resolve())

    def get_ext_filename(self, fullname):
        return fullname.replace(".", "/") + ".so"


class AnyPythonWheel(bdist_wheel):
    """With the extension the wheel is for one platform and, still, any Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


if cuda.wanted():
    setup(
        ext_modules=[Extension("lorasb_kernels._C", sources=[])],
        cmdclass={"build_ext": BuildCuda, "bdist_wheel": AnyPythonWheel},
    )
else:
    setup()
