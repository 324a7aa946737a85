"""Coded tensors: what the formulas say, in the bits that the formulas say, and exactly again from what is stored."""

import math

import numpy as np
import pytest
import torch

from bklm.compression.coding import SHRUNK, factors, half, integers, pack_bits, read, unpack_bits


def hard_weights(rows=7, width=37):
    """Rows of very different size, a zero row, and one large number among small ones."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(rows, width, generator=g) * torch.logspace(-2, 1, rows).unsqueeze(1)
    w[2] = 0.0
    w[4, 5] = 9 * w[4].abs().max()
    return w


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 64, 101])
def test_numbers_lie_one_after_the_other_in_as_many_bits_as_asked_for(bits, count):
    numbers = torch.randint(2**bits, (count,))
    packed = pack_bits(numbers, bits)
    assert len(packed) == math.ceil(count * bits / 8)
    as_one = sum(int(n) << (bits * i) for i, n in enumerate(numbers.tolist()))
    assert int.from_bytes(packed.numpy().tobytes(), "little") == as_one
    assert torch.equal(unpack_bits(packed, bits, count).long(), numbers)


@pytest.mark.parametrize("group", [None, 1, 8, 36, 37, 100])
def test_eight_bits_are_the_nearest_steps_of_a_scale_that_clips_nothing(group):
    w = hard_weights()
    coded = integers(w, 8, group)
    size = w.shape[1] if group is None else min(group, w.shape[1])
    decoded = coded.decode().double().numpy()
    for row in range(len(w)):
        for start in range(0, w.shape[1], size):
            block = w[row, start : start + size].double().numpy()
            scale = float(coded.scales[row, start // size])
            peak = np.abs(block).max()
            if peak == 0:
                assert (decoded[row, start : start + size] == 0).all()
                continue
            # One byte a scale: at most a sixteenth of an octave above the one that is needed.
            assert peak / 127 * (1 - 1e-6) <= scale <= peak / 127 * 2 ** (1 / 16) * (1 + 1e-6)
            error = np.abs(decoded[row, start : start + size] - block)
            assert error.max() <= scale / 2 * (1 + 1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_few_bits_take_the_scale_of_the_least_squared_error(bits):
    w = hard_weights()
    coded = integers(w, bits, 16)
    assert coded.codes is not None
    levels, decoded = 2 ** (bits - 1) - 1, coded.decode().double().numpy()
    for row in range(len(w)):
        for start in range(0, w.shape[1], 16):
            block = w[row, start : start + 16].double().numpy()
            peak = np.abs(block).max()
            if peak == 0:
                continue
            plain = peak / levels
            errors = []
            for share in SHRUNK:
                # The same byte for the scale, worked out with the base that was chosen.
                code = min(255, math.floor(16 * math.log2(coded.base / (plain * share)) + 1e-9))
                scale = coded.base * 2 ** (-code / 16)
                steps = np.clip(np.round(block / scale), -levels, levels)
                errors.append(np.square(steps * scale - block).sum())
            got = np.square(decoded[row, start : start + 16] - block).sum()
            assert got <= min(errors) * (1 + 1e-4)


@pytest.mark.parametrize("shape", [(5, 33), (3, 5, 17)])
@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 8), (3, 32), (2, None)])
def test_what_is_stored_is_read_back_bit_for_bit(shape, bits, group):
    w = torch.randn(shape)
    w[0] = 0.0
    coded = integers(w, bits, group, columns=torch.rand(shape[-1]) + 0.5)
    tensors, facts = coded.stored()
    assert torch.equal(read(tensors, facts).decode(), coded.decode())
    assert tensors["ints"].numel() <= math.ceil(w.numel() * bits / 8)


def test_zeros_cost_one_bit_each():
    w = torch.randn(40, 50)
    w[torch.rand(40, 50) < 0.7] = 0.0
    coded = integers(w, 8)
    tensors, facts = coded.stored()
    assert tensors["ints"].numel() == int((coded.values != 0).sum())
    assert tensors["mask"].numel() == 250
    assert torch.equal(read(tensors, facts).decode(), coded.decode())


def test_rows_too_far_apart_for_a_byte_keep_their_scales_whole():
    w = torch.randn(3, 20) * torch.tensor([[1.0], [1e-9], [1e-20]])
    coded = integers(w, 8)
    assert coded.codes is None
    assert ((coded.decode() - w).abs().amax(1) <= w.abs().amax(1) / 250).all()
    tensors, facts = coded.stored()
    assert torch.equal(read(tensors, facts).decode(), coded.decode())


def test_factors_are_the_nearest_matrix_of_their_rank():
    w = torch.randn(30, 12)
    u, s, v = np.linalg.svd(w.double().numpy(), full_matrices=False)
    nearest = (u[:, :5] * s[:5]) @ v[:5]
    assert np.allclose(factors(w, 5, None).decode().numpy(), nearest, atol=2e-2)
    coded = factors(w, 5, 8)
    assert np.allclose(coded.decode().numpy(), nearest, atol=1e-1)
    tensors, facts = coded.stored()
    assert torch.equal(read(tensors, facts).decode(), coded.decode())


def test_half_precision_is_refused_where_numbers_do_not_fit():
    assert half(torch.tensor([1.0, 1e5])) is None
    assert half(torch.tensor([1e-9, 2e-9])) is None
    assert torch.equal(half(torch.tensor([1.0, 0.0, -2.5])).decode(), torch.tensor([1.0, 0.0, -2.5]))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: integers(torch.randn(2, 3), 9), "bits: got 9; a weight is rounded to 2 to 8"),
        (lambda: integers(torch.randn(2, 3), 4, 0), "group: got 0; give the number of inputs"),
        (lambda: integers(torch.full((2, 3), torch.nan)), "NaN or infinity"),
        (lambda: factors(torch.randn(4, 3), 4), "rank: got 4 for a weight of shape"),
    ],
)
def test_bad_values_are_refused_in_one_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()
