"""The build: what it asks of the machine, what it says, and that it never touches torch."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

import fastconv

# .ci/run also runs the tests beside an installed package, where there is no fastconv/ to build.
ROOT = Path(os.environ.get("FASTCONV_SOURCE", Path(__file__).parents[2]))

for tool in ("ninja", "pybind11", "setuptools"):
    pytest.importorskip(tool, reason="the build's own requirements are not installed here")


from emulator.build import import_build  # noqa: E402

import_build()
from _build import backend, ninjafile, sources, toolchain  # noqa: E402

TORCH = Path(torch.__file__).parent


# ---- what the build asks of the machine


def test_requires_no_torch_where_there_is_one(monkeypatch):
    monkeypatch.setenv("FASTCONV_CUDA", "auto")
    assert backend.missing_here() == []
    monkeypatch.setattr(backend, "find_torch", lambda: None)
    assert backend.missing_here() == ["torch>=2.11"]


def test_fetches_nvcc_only_when_asked_and_needed(monkeypatch):
    monkeypatch.setattr(backend, "find_cuda", lambda: None)
    monkeypatch.setattr(backend, "cuda_sources", lambda: [Path("a.cu")])
    monkeypatch.setenv("FASTCONV_CUDA", "auto")
    assert backend.missing_here() == []
    monkeypatch.setenv("FASTCONV_CUDA", "1")
    wheels = backend.missing_here()
    assert "nvidia-cuda-nvcc==13.0.*" in wheels
    assert all(wheel.endswith("==13.0.*") for wheel in wheels)
    monkeypatch.setattr(backend, "cuda_sources", list)
    assert backend.missing_here() == []


def test_finds_the_torch_behind_build_isolation(monkeypatch):
    monkeypatch.delenv("FASTCONV_TORCH", raising=False)
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    assert toolchain.find_torch().root == TORCH


def test_finds_the_named_torch(monkeypatch, tmp_path):
    (tmp_path / "torch").symlink_to(TORCH)
    monkeypatch.setenv("FASTCONV_TORCH", str(tmp_path / "torch"))
    assert toolchain.find_torch().version == torch.__version__


@pytest.mark.parametrize(
    ("version_file", "words"),
    [
        pytest.param("__version__ = '2.9.1+cpu'\n", ["2.9.1", "too old", ">= 2.11"], id="old"),
        pytest.param("__version__ = '3.0.0'\n", ["3.0.0", "without its C++ headers"], id="bare"),
        pytest.param(None, ["not an installed torch", "FASTCONV_TORCH"], id="no torch"),
    ],
)
def test_unfit_torch(monkeypatch, tmp_path, version_file, words):
    if version_file:
        (tmp_path / "version.py").write_text(version_file)
    monkeypatch.setenv("FASTCONV_TORCH", str(tmp_path))
    with pytest.raises(SystemExit) as end:
        toolchain.find_torch()
    assert all(word in str(end.value) for word in [*words, str(tmp_path)])


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler .* apt install g\+\+"):
        toolchain.find_compiler()
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(SystemExit, match="no-such-compiler"):
        toolchain.find_compiler()


def test_compiler_too_old(monkeypatch, tmp_path):
    old = tmp_path / "old-g++"
    old.write_text("#!/bin/sh\n[ $1 = --version ] && echo old-g++ 4.8 && exit\necho no c++20 >&2; exit 1")
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    with pytest.raises(SystemExit, match=r"old-g\+\+ 4\.8.*does not compile C\+\+20(.|\n)*no c\+\+20"):
        toolchain.find_compiler()


def test_compiler_behind_a_launcher(monkeypatch):
    command = toolchain.find_compiler().command
    monkeypatch.setenv("CXX", f"env {command[0]}")
    assert toolchain.find_compiler().command == ["env", command[0]]


@pytest.mark.parametrize(
    ("memory", "max_jobs", "jobs"),
    [
        pytest.param(64e9, "", 8, id="cores"),
        pytest.param(3.5e9, "", 3, id="memory"),
        pytest.param(0.2e9, "", 1, id="always one"),
        pytest.param(0.2e9, "5", 5, id="MAX_JOBS"),
        pytest.param(64e9, "0", 1, id="MAX_JOBS=0"),
    ],
)
def test_parallel_jobs(monkeypatch, memory, max_jobs, jobs):
    monkeypatch.setattr(toolchain, "available_memory", lambda: int(memory))
    monkeypatch.setattr(toolchain.os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setenv("MAX_JOBS", max_jobs)
    assert toolchain.parallel_jobs(1_000_000_000) == jobs


def test_available_memory():
    assert 100e6 < toolchain.available_memory() < 100e12


# ---- what it tells ninja


@pytest.mark.parametrize(("wish", "archs"), [("80+PTX 90a", ["80+PTX", "90a"]), ("75, 100f", ["75", "100f"])])
def test_cuda_archs(monkeypatch, wish, archs):
    monkeypatch.setenv("FASTCONV_CUDA_ARCHS", wish)
    assert ninjafile.cuda_archs() == archs


def test_a_folder_says_for_which_gpus(monkeypatch, tmp_path):
    """What an architecture's folder holds is built for no other; what has instances, once for each."""
    for path in ("conv2d/sm80/instances.cu", "conv2d/sm90a/conv.cu", "lrn/sm100/lrn.cu", "runtime/stray.cu"):
        file = tmp_path / "cuda" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    monkeypatch.setattr(sources, "CSRC", tmp_path)
    with pytest.raises(ValueError, match=r"stray\.cu is not in a folder that names an architecture"):
        list(sources.cuda_units(["80"]))
    (tmp_path / "cuda/runtime/stray.cu").unlink()

    def built(*archs: str) -> dict[str, tuple[str, ...]]:
        return {unit.output: unit.archs for unit in sources.cuda_units(archs)}

    found = built("80+PTX", "90a", "120")
    assert found["cuda/conv2d/sm90a/conv.cu.o"] == ("90a",)
    assert found["cuda/lrn/sm100/lrn.cu.o"] == ("120",)
    instances = {name: archs for name, archs in found.items() if "instances" in name}
    assert len(instances) == 9
    assert set(instances.values()) == {("80+PTX", "90a", "120")}
    assert not any("sm90a" in name for name in built("80+PTX", "90", "100a"))
    defines = {unit.output: unit.defines for unit in sources.cuda_units(["90a"])}
    assert defines["cuda/conv2d/sm90a/conv.cu.o"] == ("-DFASTCONV_ARCH=90", "-DFASTCONV_ARCH_ONLY=1")
    assert "-DFASTCONV_PASS=kDgrad" in defines["cuda/conv2d/sm80/instances-kDgrad-kFloat16.cu.o"]


def test_gpus_that_no_kernel_is_for(monkeypatch):
    monkeypatch.setenv("FASTCONV_CUDA_ARCHS", "80+PTX 75")
    monkeypatch.setattr(ninjafile, "wanted_cuda", lambda: toolchain.Cuda("nvcc", "13.0", Path(), Path()))
    with pytest.raises(
        SystemExit, match="FASTCONV_CUDA_ARCHS has 75, for which there are no kernels; name 80 or later"
    ):
        ninjafile.Build("0", toolchain.Toolchain(toolchain.Compiler(["c++"], ""), toolchain.Torch(TORCH, "2.14")))


def test_gencode():
    assert ninjafile.gencode("80+PTX") == "-gencode=arch=compute_80,code=[sm_80,compute_80]"
    assert ninjafile.gencode("90a") == "-gencode=arch=compute_90a,code=sm_90a"


@pytest.mark.parametrize(
    ("variable", "read"),
    [("FASTCONV_CUDA", ninjafile.wanted_cuda), ("FASTCONV_CUDA_ARCHS", ninjafile.cuda_archs)],
)
def test_bad_cuda_wish(monkeypatch, variable, read):
    monkeypatch.setenv(variable, "sm_80")
    with pytest.raises(SystemExit, match=f"{variable}.*sm_80"):
        read()


def test_cuda_wanted_but_no_nvcc(monkeypatch):
    monkeypatch.setattr(ninjafile, "cuda_sources", lambda: [Path("a.cu")])
    monkeypatch.setattr(ninjafile, "find_cuda", lambda: None)
    monkeypatch.setenv("FASTCONV_CUDA", "1")
    with pytest.raises(SystemExit, match=r"no nvcc was found"):
        ninjafile.wanted_cuda()
    monkeypatch.setenv("FASTCONV_CUDA", "auto")
    assert ninjafile.wanted_cuda() is None


def test_the_abi_target_is_the_one_it_says():
    major, minor = map(int, ninjafile.TORCH_TARGET.split("."))
    number = f"0x{major:02x}{minor:02x}000000000000"
    assert ninjafile.STABLE_ABI.partition("=")[2] == number
    assert (major, minor) <= toolchain.MINIMUM_TORCH


def test_the_torch_requirement_is_the_same_everywhere():
    minimum = "torch>=" + ".".join(map(str, toolchain.MINIMUM_TORCH))
    assert f'dependencies = ["{minimum}"]' in (ROOT / "pyproject.toml").read_text()


# ---- the whole way, in environments of its own


def run(*command: object, cwd: Path, **environment: str) -> str:
    """The output of a command that succeeds."""
    result = attempt(*command, cwd=cwd, **environment)
    assert result.returncode == 0, result.stdout
    return result.stdout


def attempt(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """An unpacked sdist, hence only what a user gets."""
    dist = tmp_path_factory.mktemp("dist")
    tree = tmp_path_factory.mktemp("tree") / "fastconv"
    built = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "_C.*")
    shutil.copytree(ROOT, tree, ignore=built)
    run(sys.executable, "setup.py", "-q", "sdist", "-d", dist, cwd=tree)
    (archive,) = dist.glob("fastconv-*.tar.gz")
    shutil.unpack_archive(archive, dist)
    return archive.with_name(archive.name.removesuffix(".tar.gz"))


def environment(folder: Path, *visible: Path) -> Path:
    """The interpreter of a fresh environment with these folders on its path."""
    venv.create(folder, symlinks=True)
    python = folder / "bin/python"
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = Path(run(python, "-c", purelib, cwd=folder).strip())
    (site_packages / "visible.pth").write_text("".join(f"{path}\n" for path in visible))
    return python


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """In an environment that sees the packages of this one, torch and pip among them."""
    return environment(tmp_path_factory.mktemp("environment"), TORCH.parent)


# Not optimized, and without CUDA unless a test wants it, which takes minutes.
QUICK = {"CXXFLAGS": "-O0", "FASTCONV_CUDA": "0"}


def build(source: Path, **environment: str) -> str:
    environment = QUICK | environment
    return run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=source, **environment)


def compiled(output: str) -> list[str]:
    return sorted(re.findall(r"^\[\d+/\d+\] (\S+)\.o$", output, re.MULTILINE))


CHECK = """
import json, sys, fastconv, torch
from fastconv.operators import library
x = torch.randn(2, 3, 4, 4)
torch.testing.assert_close(fastconv.ops.add_relu(x, x), torch.relu(x + x))
print(json.dumps([fastconv.__file__, library.LOADED, torch.__file__, torch.__version__]))
"""


@pytest.mark.slow
def test_isolated_install(source, python, tmp_path):
    output = run(python, "-m", "pip", "install", "-v", source, cwd=tmp_path, **QUICK)
    assert "No module named" not in output
    assert re.findall("^Successfully installed (.*)", output, re.MULTILINE) == [f"fastconv-{fastconv.__version__}"]
    version = re.escape(torch.__version__)
    assert re.search(rf"fastconv \S+ was built in \d+ s\n.*headers of torch {version}\)", output)
    assert re.search(r"  CPU +\S.* for default", output)
    assert re.search(r"  CUDA +not built, because of FASTCONV_CUDA=0", output)

    file, loaded, torch_file, torch_version = json.loads(run(python, "-c", CHECK, cwd=tmp_path))
    assert Path(file).is_relative_to(python.parent.parent)
    assert loaded
    assert (torch_file, torch_version) == (torch.__file__, torch.__version__)


@pytest.mark.slow
def test_compiles_only_what_changed(source):
    build(source)
    assert "no work to do" in build(source)
    kernel = min((source / "csrc/cpu/kernels").glob("*.cpp"), key=lambda path: path.stat().st_size)
    kernel.touch()
    capabilities = ninjafile.cpu_capabilities()
    objects = [f"cpu/kernels/{kernel.stem}.{capability}" for capability in capabilities]
    assert compiled(build(source)) == sorted(objects)
    header = source / "csrc/build_info.h"
    header.touch()
    assert compiled(build(source)) == ["build_info", "module"]
    commands = json.loads((source / "compile_commands.json").read_text())
    assert str(kernel) in {entry["file"] for entry in commands}


def small_cuda(source: Path, copy: Path) -> Path:
    """A copy in which one kernel of a line stands for all of csrc/cuda."""
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("build", "_C.*"))
    cuda = copy / "csrc/cuda"
    for folder in cuda.iterdir():
        if folder.name == "conformance":
            for arch in folder.glob("sm*"):  # what is left is asked for by Python
                shutil.rmtree(arch)
        elif folder.name not in ("runtime", "ptx"):
            shutil.rmtree(folder)
    for arch in ("sm80", "sm90a"):
        (cuda / "double_it" / arch).mkdir(parents=True)
        (cuda / "double_it" / arch / "double_it.cu").write_text(
            """
            #include "cuda/runtime/launch.cuh"
            namespace fastconv::cuda {
            namespace {
            FASTCONV_KERNEL(32, 1) double_it(float* x) { x[threadIdx.x] *= 2; }
            const ListedKernel kernel({"double_it_sm" + std::to_string(kArch.number), "double_it", kArch,
                                       {0, 0, 0}, 0, 32, 0, ""});
            }
            void LAUNCH(float* x, Stream stream) { launch(kernel.info, double_it, {{1}, {32}}, stream, x); }
            }
        """.replace("LAUNCH", f"launch_{arch}")
        )
    return copy


@pytest.mark.slow
def test_cuda_kernels(source, monkeypatch, tmp_path):
    """Where there is an nvcc. What FASTCONV_CUDA asks for is above; test_isolated_install builds without CUDA."""
    monkeypatch.setenv("FASTCONV_CUDA", "auto")
    found = toolchain.find_cuda()
    source = small_cuda(source, tmp_path / "fastconv")
    output = build(source, FASTCONV_CUDA="auto", FASTCONV_CUDA_ARCHS="80+PTX")
    (line,) = re.findall(r"  CUDA +(.*)", output)
    if found is None:
        assert line.startswith("not built, because no nvcc was found")
    else:
        assert line == f"double_it for sm_80+PTX, by nvcc {found.version}"
        assert {name for name in compiled(output) if "double_it" in name} == {"cuda/double_it/sm80/double_it.cu"}
        table = "import json, fastconv._C as c; print(json.dumps([k['name'] for k in c.kernel_table()]))"
        assert json.loads(run(sys.executable, "-c", table, cwd=source, PYTHONPATH=str(source))) == ["double_it_sm80"]
    # Whatever was built loads here, without a GPU and under a CPU-only torch.
    assert json.loads(run(sys.executable, "-c", CHECK, cwd=source, PYTHONPATH=str(source)))[1]


@pytest.mark.slow
def test_compile_error_is_one_line_after_the_compilers(source):
    broken = source / "csrc/broken.cpp"
    broken.write_text("int f() { return nothing; }\n")
    try:
        result = attempt(sys.executable, "setup.py", "build_ext", "--inplace", cwd=source, FASTCONV_CUDA="0")
    finally:
        broken.unlink()
    assert result.returncode == 1
    assert "csrc/broken.cpp:1:" in result.stdout
    assert result.stdout.strip().endswith("the compiler's messages above say why")
    assert "Traceback" not in result.stdout


@pytest.mark.slow
def test_unisolated_build_names_what_is_missing(source, tmp_path):
    setup = ("setup.py", "build_ext", "--inplace")
    tools = tmp_path / "tools"
    tools.mkdir()
    python = environment(tmp_path / "environment", tools)

    def add(*names: str) -> None:
        for name in names:
            folder = Path(importlib.util.find_spec(name).origin).parent
            (tools / name).symlink_to(folder)

    add("setuptools", "_distutils_hack")
    result = attempt(python, *setup, cwd=source)
    assert result.returncode == 1
    assert result.stdout.strip().startswith("fastconv: the build needs ninja and pybind11; pip")
    add("ninja", "pybind11")
    result = attempt(python, *setup, cwd=source)
    assert result.returncode == 1
    assert result.stdout.strip().splitlines()[-1].startswith("fastconv: torch was not found")
