"""The colours of features: the principal axes of all of them, found one image at a time."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.train


def test_axes_are_those_of_a_singular_value_decomposition_of_everything() -> None:
    import torch

    from f3rm_verify.f3rm.pca import fit_colour_projection

    fine = torch.randn(5, 8, 6, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([5.0, 0.5, 0.1])
    coarse = torch.randn(5, 4, 3, 4, generator=torch.Generator().manual_seed(2)) * torch.tensor([3.0, 2.0, 0.1, 0.1])
    projection = fit_colour_projection([coarse, fine])
    both = torch.cat([coarse.repeat_interleave(2, 1).repeat_interleave(2, 2), fine], -1).reshape(-1, 7).double()
    _, _, axes = torch.linalg.svd(both - both.mean(0), full_matrices=False)
    assert torch.allclose((axes[:3] @ projection.axes.double()).abs(), torch.eye(3).double(), atol=1e-5)
    assert (projection.axes.gather(0, projection.axes.abs().argmax(0, keepdim=True)) > 0).all()
    low, high = torch.quantile(both @ projection.axes.double(), torch.tensor([0.01, 0.99]).double(), dim=0)
    assert torch.allclose(projection.low.double(), low, atol=1e-5)
    assert torch.allclose(projection.high.double(), high, atol=1e-5)


def test_one_image_at_a_time_is_float64_and_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from f3rm_verify.f3rm.pca import fit_colour_projection

    features = torch.randn(6, 4, 4, 8, generator=torch.Generator().manual_seed(1))
    sizes: list[int] = []
    double = torch.Tensor.double
    monkeypatch.setattr(torch.Tensor, "double", lambda self: (sizes.append(self.numel()), double(self))[1])
    state = torch.get_rng_state()
    first, second = (fit_colour_projection([features]) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert set(sizes) == {4 * 4 * 8}


def test_fewer_than_three_channels_have_colours() -> None:
    import torch

    from f3rm_verify.f3rm.pca import fit_colour_projection

    features = torch.randn(2, 3, 3, 2, generator=torch.Generator().manual_seed(1))
    colours = fit_colour_projection([features]).apply(features)
    assert colours.shape == (2, 3, 3, 3)
    assert colours.min() >= 0 and colours.max() <= 1
