from setuptools import Extension, setup

from _build.extension import BuildExtension

setup(
    ext_modules=[Extension("fastconv._C", sources=[])],
    cmdclass={"build_ext": BuildExtension},
)
