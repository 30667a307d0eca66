"""The tolerance policy lets right results pass and catches the mistakes that it exists for."""

import pytest
import torch
import torch.nn.functional as F

from fastconv.measure import tolerance

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def conv_case(dtype, channels=32, pixels=9):
    torch.manual_seed(0)
    x = torch.randn(1, channels, pixels, pixels).to(dtype)
    weight = torch.randn(8, channels, 3, 3).to(dtype)
    oracle = F.conv2d(x.double(), weight.double(), padding=1)
    return x, weight, oracle, F.conv2d(x, weight, padding=1)


def sequential_conv(x, weight):
    """Another order of summation: one product after the other, rounded once."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    columns = F.unfold(x.to(accumulate), 3, padding=1)
    total = torch.zeros(x.shape[0], weight.shape[0], columns.shape[2], dtype=accumulate)
    for i, row in enumerate(weight.flatten(1).to(accumulate).unbind(1)):
        total += row[:, None] * columns[:, i, None]
    return total.view(x.shape[0], weight.shape[0], *x.shape[2:]).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "pixels"), [(1, 1), (32, 9)])
def test_another_order_of_summation_passes(dtype, channels, pixels):
    x, weight, oracle, baseline = conv_case(dtype, channels, pixels)
    out = sequential_conv(x, weight)
    tolerance.assert_close_to_oracle(out, oracle, baseline, what="sequential sum", border=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_wrong_pixel_is_found_and_named(dtype):
    _, _, oracle, baseline = conv_case(dtype)
    out = baseline.clone()
    out[0, 3, 0, 4] += 0.05 * oracle.abs().max().to(dtype)
    border, interior = tolerance.compare(out, oracle, baseline, border=1).regions
    assert (border.ok, border.failures, border.index) == (False, 1, (0, 3, 0, 4))
    assert interior.ok
    with pytest.raises(AssertionError, match=r"poked conv .*torch seed 0\): border: .* 1 of 256 .*\(0, 3, 0, 4\)"):
        tolerance.assert_close_to_oracle(out, oracle, baseline, what="poked conv", border=1)


def test_regions_partition_the_output():
    sizes = {}
    for border in (None, 1, 2, 5, 9):
        zeros = torch.zeros(2, 3, 9, 5)
        regions = tolerance.compare(zeros, zeros.double(), zeros, border=border).regions
        sizes[border] = [(region.name, region.size // 6) for region in regions]
    assert sizes == {
        None: [("all", 45)],
        1: [("border", 24), ("interior", 21)],
        2: [("border", 40), ("interior", 5)],
        5: [("border", 45)],
        9: [("border", 45)],
    }


def test_poor_precision_fails_beside_a_good_baseline():
    x, weight, oracle, baseline = conv_case(torch.float32)
    through_bf16 = F.conv2d(x.bfloat16().float(), weight.bfloat16().float(), padding=1)
    assert not tolerance.compare(through_bf16, oracle, baseline).ok


def test_the_cap_catches_what_a_poor_baseline_excuses():
    """Squares overflow in eager's half precision LRN: twice its error would allow anything."""
    x = torch.tensor([300.0, 1.0]).half().view(1, 2, 1)
    oracle = F.local_response_norm(x.double(), size=2, k=1.0)
    overflowed = F.local_response_norm(x, size=2, k=1.0)
    right = F.local_response_norm(x.float(), size=2, k=1.0).half()
    assert not tolerance.compare(overflowed, oracle, overflowed).ok
    assert tolerance.compare(right, oracle, overflowed).ok


def test_nan_and_inf_must_stay():
    oracle = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf], dtype=torch.float64)
    same = oracle.float()
    assert tolerance.compare(same, oracle, same).ok
    for index, value in ((0, torch.nan), (1, 0.0), (2, torch.nan), (3, torch.inf)):
        wrong = same.clone()
        wrong[index] = value
        region = tolerance.compare(wrong, oracle, same).regions[0]
        assert (region.failures, region.index) == (1, (index,))


def test_overflow_of_the_output_dtype_is_inf_by_right():
    oracle = torch.tensor([1e6, 1.0], dtype=torch.float64)
    assert tolerance.compare(oracle.half(), oracle, oracle.half()).ok


def test_empty_output_passes():
    empty = torch.empty(0, 3, 4, 4)
    assert tolerance.compare(empty, empty.double(), empty, border=1).ok


@pytest.mark.parametrize(
    ("out", "oracle", "baseline", "message"),
    [
        (torch.ones(2), torch.ones(2), torch.ones(2), "oracle is torch.float32"),
        (torch.ones(2).half(), torch.ones(2).double(), torch.ones(2), "same floating dtype"),
        (torch.ones(2, 1), torch.ones(2).double(), torch.ones(2), r"output is \(2, 1\)"),
    ],
)
def test_what_no_tolerance_excuses(out, oracle, baseline, message):
    with pytest.raises(ValueError, match=message):
        tolerance.compare(out, oracle, baseline)


def test_away_from_kinks():
    preactivation = torch.tensor([-1.0, 0.0, 1e-7, 3.0, 6.0, 6.0 + 1e-7, 7.0]).double()
    away = {
        activation: tolerance.away_from_kinks(preactivation, activation).int().tolist()
        for activation in ("none", "relu", "relu6")
    }
    assert away == {
        "none": [1, 1, 1, 1, 1, 1, 1],
        "relu": [1, 0, 0, 1, 1, 1, 1],
        "relu6": [1, 0, 0, 1, 0, 0, 1],
    }


def test_poisoned_outputs_are_nan_and_the_settings_come_back():
    before = torch.are_deterministic_algorithms_enabled()
    with tolerance.poisoned_outputs():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.ones(2, 2)).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before


def test_the_comparison_stays_on_the_oracles_device():
    """Whatever the default device is: where the Triton tests run, a GPU."""
    _, _, oracle, baseline = conv_case(torch.float32)
    expected = tolerance.compare(baseline, oracle, baseline, border=1)
    with torch.device("meta"):
        assert tolerance.compare(baseline, oracle, baseline, border=1) == expected
