"""The WKV6 reference: its derivative, its layout, and its values for an example computed by hand."""

import math

import torch

from rwkv_peft.ops.wkv6.reference import wkv6_reference
from tests.ops.wkv6.wkv6_cases import make_inputs


def test_gradcheck_in_all_six_inputs():
    inputs = [x.double().requires_grad_() for x in make_inputs(B=2, T=4, H=2, N=3)]
    assert torch.autograd.gradcheck(wkv6_reference, inputs)


def test_two_tokens_by_hand():
    """The values are asymmetric, so swapping key and value, or bonus and decay, changes the result."""
    r = torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=torch.float64).view(1, 2, 1, 2)
    k = torch.tensor([[7.0, 11.0], [13.0, 17.0]], dtype=torch.float64).view(1, 2, 1, 2)
    v = torch.tensor([[19.0, 23.0], [29.0, 31.0]], dtype=torch.float64).view(1, 2, 1, 2)
    w = torch.log(-torch.log(torch.tensor([0.5, 0.25], dtype=torch.float64))).expand(1, 2, 1, 2)  # decays 1/2 and 1/4
    u = torch.tensor([[2.0, 3.0]], dtype=torch.float64)

    y, state = wkv6_reference(r, k, v, w, u)

    bonus_0 = 1 * 2 * 7 + 2 * 3 * 11
    assert y[0, 0, 0].tolist() == [bonus_0 * 19, bonus_0 * 23]
    bonus_1, carried = 3 * 2 * 13 + 5 * 3 * 17, 3 * 7 + 5 * 11  # token 0 is not decayed yet when token 1 reads it
    assert y[0, 1, 0].tolist() == [bonus_1 * 29 + carried * 19, bonus_1 * 31 + carried * 23]
    key_0, key_1 = state[0, 0].tolist()
    assert math.isclose(key_0[1], 0.5 * 7 * 23 + 13 * 31)
    assert math.isclose(key_1[0], 0.25 * 11 * 19 + 17 * 29)
