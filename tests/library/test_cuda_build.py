"""The machine code of the CUDA kernels, as far as one can judge it without a GPU."""

import copy
import importlib.util
import re
import subprocess

import pytest

pytest.importorskip("ninja", reason="the build's own requirements are not installed here")
from emulator.build import import_build
from support.tools import expected, machine_code

# Disassembling takes a while.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cuda_library")]

# Later GPUs compile the library's PTX when they load it: here, ptxas does.
LATER = ["sm_100", "sm_120"]
# Kernels that may keep something in local memory, and why
LOCAL_MEMORY: dict[str, str] = {}


def kernels() -> dict[str, dict[str, machine_code.Kernel]]:
    return machine_code.kernels(machine_code.library())


def instructions(arch: str) -> dict[str, set[str]]:
    """With all their suffixes."""
    found = machine_code.code(machine_code.library(), arch)
    return {name: {instruction.name for instruction in code} for name, code in found.items()}


def wanted(name: str) -> set[str]:
    """HMMA is what became of mma, LDSM of ldmatrix, LDGSTS of cp.async; HGMMA of wgmma, STSM of stmatrix, UTMALDG and
    UTMASTG of boxes."""
    if name.startswith("depthwise_separable::fprop_nhwc"):
        return {"HMMA", "LDSM", "LDGSTS"}
    if name.startswith("sm90a::conv2d_box_kernel"):
        return {"HGMMA", "UTMALDG", "UTMASTG", "STSM"}
    if name.startswith("sm90a::conv2d_halo_kernel"):
        # Residuals are read as they were written, transposed.
        return {"HGMMA", "UTMALDG", "STSM"} | ({"LDSM"} if "(Pass)0" in name else set())
    if name.startswith("sm90a::conv2d_halo_wgrad_kernel"):
        return {"HGMMA", "UTMALDG"}
    if name.startswith("conv2d_stem_"):
        return {"HMMA", "LDSM"} | ({"LDGSTS"} if "wgrad" in name else set())
    if name.startswith("conformance::run<"):
        tried = {"CpAsync": "LDGSTS", "Ldmatrix": "LDSM", "Mma": "HMMA"}
        return {word for case, word in tried.items() if f"conformance::{case}" in name}
    if not name.startswith("conv2d_kernel"):
        return set()
    # cp.async copies no less than 4 bytes, so a gather of 16-bit elements cannot use it.
    gathers = re.search(r"Math(<\w+>)?( ?>)?, (\d+, ){5}1, \d+>", name) is not None
    if "HalfMath" in name:
        return {"HMMA", "LDSM"} if gathers else {"HMMA", "LDSM", "LDGSTS"}
    # ldmatrix moves 16-bit elements; transposing, it would tear those of TF32 apart: in wgrad, of both operands.
    if "Tf32Math" in name:
        return {"HMMA", "LDGSTS"} if "(Pass)2" in name else {"HMMA", "LDSM", "LDGSTS"}
    return {"LDGSTS"}


def test_every_architecture_has_the_same_kernels():
    found = kernels()
    assert {"sm_80", "sm_90a"} <= found.keys()
    for_all = [{name for name in each if not re.match(r"sm\d+[af]::", name)} for each in found.values()]
    assert len({frozenset(each) for each in for_all}) == 1


def test_no_local_memory():
    spilled = {
        f"{arch}: {name}": kernel.stack
        for arch, each in kernels().items()
        for name, kernel in each.items()
        if kernel.stack and name not in LOCAL_MEMORY
    }
    assert spilled == {}


def test_no_static_shared_memory():
    # Of every block on sm_90, 1 KiB is the system's.
    most = {"sm_80": 0, "sm_90a": 1024}
    for arch, each in kernels().items():
        assert max(kernel.shared for kernel in each.values()) <= most.get(arch, 1024), arch


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_instructions(arch):
    found = {name: {word.partition(".")[0] for word in words} for name, words in instructions(arch).items()}
    assert found.keys() == kernels()[arch].keys()
    of_all = {"HMMA", "LDSM", "LDGSTS"}
    telling = of_all | {"HGMMA", "UTMALDG", "UTMASTG", "STSM"}
    # What conformance tries for one architecture is held against what it says when it runs.
    found = {name: kinds for name, kinds in found.items() if not name.startswith("sm90a::conformance")}
    other = {name: kinds & telling for name, kinds in found.items() if kinds & telling != wanted(name)}
    assert other == {}
    assert any(wanted(name) == of_all for name in found)
    assert any("HMMA.1688.F32.TF32" in words for words in instructions(arch).values())
    local = {name: kinds & {"LDL", "STL"} for name, kinds in found.items() if name not in LOCAL_MEMORY}
    assert not any(local.values()), local


def test_products_of_warpgroups_are_not_serialised():
    """Of a stage all HGMMA follow each other: ptxas would wait after each one where it does not trust the program."""
    code = machine_code.code(machine_code.library(), "sm_90a")
    kernels = {name: each for name, each in code.items() if name.startswith("sm90a::conv2d_")}
    assert any("halo" in name for name in kernels)
    for name, each in kernels.items():
        # Each group of products, also those of the other loops, begins once and ends once.
        begun = sum(one.name == "WARPGROUP.ARRIVE" for one in each)
        assert begun == sum(one.name.startswith("HGMMA") and one.operands.endswith("gsb0") for one in each), name
        loop = machine_code.main_loop(each)
        words = [instruction.name.partition(".HI")[0] for instruction in loop.instructions]
        # With a halo products may be waited for before the place of their boxes is given away.
        assert words.count("WARPGROUP.ARRIVE") == 1, name
        assert words.count("WARPGROUP.DEPBAR.LE") == (2 if "halo_kernel" in name else 1), name
        products = [i for i, word in enumerate(words) if word.startswith("HGMMA")]
        assert len(products) in (4, 8), name
        between = range(products[0], products[-1])
        assert not any(words[i].startswith(("WARPGROUP", "BAR", "SYNCS")) for i in between), name
        # Of the clocks that the products take a scheduler, which issues for two such warps in turn, has most left.
        columns = sum(int(words[i].split(".")[1].split("x")[1]) for i in products)
        # With a halo an address is computed anew for each position: two thirds are left.
        most = 1 / 3 if "halo" in name else 0.16 if columns >= 768 else 0.3
        assert len(words) <= most * columns / 2, name


def test_boxes_are_loaded_both_ways():
    code = instructions("sm_90a")
    words = set().union(*(each for name, each in code.items() if name.startswith("sm90a::conv2d_box_kernel")))
    assert {"UTMALDG.2D", "UTMALDG.3D", "UTMALDG.4D.IM2COL", "UTMASTG.2D", "UTMASTG.3D"} <= words
    assert {"UTMALDG.2D.MULTICAST", "UTMALDG.3D.MULTICAST", "UTMALDG.4D.IM2COL.MULTICAST"} <= words


def test_resources_are_those_recorded():
    recorded = expected.recorded_resources()
    if recorded["nvcc"] != expected.nvcc_version():
        pytest.skip(f"recorded with nvcc {recorded['nvcc']}, built with {expected.nvcc_version()}")
    changed = expected.resource_changes(recorded, expected.resources())
    assert changed == [], "make sass ARGS=--write records what is meant"


def test_a_changed_resource_is_noticed():
    now = expected.resources()
    other = copy.deepcopy(now)
    name = next(iter(other["code"]["sm_80"]))
    other["code"]["sm_80"][name] += 1
    gone = next(iter(other["code"]["sm_90a"]))
    del other["code"]["sm_90a"][gone]
    assert [line.partition(":")[0] for line in expected.resource_changes(other, now)] == ["sm_80", "sm_90a"]


@pytest.mark.parametrize("arch", LATER)
def test_ptx_compiles_for_later_gpus(arch, tmp_path):
    """Every second file for each, which differ little: of float16's and bfloat16's, twins in size, each has one."""
    cuda = import_build().toolchain.find_cuda()
    ptxas = cuda and cuda.include.parent / "bin/ptxas"
    if not ptxas or not ptxas.is_file():
        triton = importlib.util.find_spec("triton")
        pytest.skip(f"there is no ptxas of the CUDA toolkit on this machine{' (Triton has its own)' if triton else ''}")
    files = sorted(machine_code.ptx(machine_code.library(), tmp_path), key=lambda file: file.stat().st_size)
    assert len(files) >= len(LATER)
    for file in files[LATER.index(arch) :: len(LATER)]:
        result = subprocess.run(
            [ptxas, f"-arch={arch}", "-v", "-o", tmp_path / "out.cubin", file], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        stores = re.findall(r"(\d+) bytes spill stores", result.stderr)
        assert not any(map(int, stores)), result.stderr
