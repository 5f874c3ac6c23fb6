"""Losses against a plain float64 reference, written from the formulas and nothing else."""

import math

import pytest
import torch

from mulcot_ray.training.examples import IGNORE, Example, collate
from mulcot_ray.training.losses import answer_positions, cross_entropy_sum, soft_sum


def reference(student, assistant, targets, temperature):
    """Sums of CE and T²·KL, one position at a time, in Python floats."""
    ce = kl = 0.0
    for z, a, y in zip(student.tolist(), assistant.tolist(), targets.tolist(), strict=True):
        ce -= z[y] - math.log(sum(math.exp(x) for x in z))
        n = min(len(z), len(a))
        q, p = [math.exp(x / temperature) for x in z[:n]], [math.exp(x / temperature) for x in a[:n]]
        q, p = [x / sum(q) for x in q], [x / sum(p) for x in p]
        kl += temperature**2 * sum(pi * math.log(pi / qi) for pi, qi in zip(p, q, strict=True))
    return ce, kl


@pytest.mark.parametrize(("vs", "va"), [(11, 11), (11, 14), (14, 11)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_values_equal_the_reference(vs, va, temperature):
    g = torch.Generator().manual_seed(0)
    student, assistant = torch.randn(7, vs, generator=g, dtype=torch.float64), torch.randn(7, va, generator=g, dtype=torch.float64)
    targets = torch.randint(0, min(vs, va), (7,), generator=g)
    ce, kl = reference(student, assistant, targets, temperature)
    assert float(cross_entropy_sum(student, targets)) == pytest.approx(ce, rel=1e-5)
    assert float(soft_sum(student, assistant, temperature)) == pytest.approx(kl, rel=1e-5)


def test_gradient_of_the_soft_loss_does_not_fade_with_temperature():
    """d(T²·KL)/dz = T·(q - p): the factor T² keeps soft and hard gradients of the same order."""
    z = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
    a = torch.tensor([[0.0, 2.0, 0.0]])
    soft_sum(z, a, 2.0).backward()
    expected = 2.0 * (torch.softmax(z / 2, -1) - torch.softmax(a / 2, -1))
    assert torch.allclose(z.grad, expected, atol=1e-6)


def test_no_soft_loss_against_itself():
    z = torch.randn(5, 9)
    assert float(soft_sum(z, z.clone(), 2.0)) == pytest.approx(0, abs=1e-5)


def test_positions_are_the_answers_and_shifted():
    hidden = torch.arange(2 * 5).reshape(2, 5, 1).float()
    labels = torch.tensor([[IGNORE, IGNORE, 7, 8, IGNORE], [IGNORE, IGNORE, IGNORE, IGNORE, 0]])  # 0 is a token like any other
    h, y = answer_positions(hidden, labels)
    assert h.flatten().tolist() == [1, 2, 8] and y.tolist() == [7, 8, 0]


def test_collate_masks_by_length_even_where_pad_is_a_real_token():
    import numpy as np

    a = Example(np.array([5, 0, 6, 0]), np.array([IGNORE, IGNORE, 6, 0]), None)
    b = Example(np.array([5, 9]), np.array([IGNORE, 9]), None)
    batch = collate([a, b], pad_id=0, image_token_id=99)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, IGNORE, 6, 0], [IGNORE, 9, IGNORE, IGNORE]]
    assert "pixel_values" not in batch
