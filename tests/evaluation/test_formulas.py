"""Each formula against another library or the formula written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from flexclear.evaluation import formulas
from flexclear.evaluation.lpips import LearnedDistance, learned_weights

GENERATOR = np.random.default_rng(0)


def pictures(count=3, height=37, width=51):
    first = torch.from_numpy(GENERATOR.integers(0, 256, (count, 3, height, width), dtype=np.uint8))
    noise = torch.from_numpy(GENERATOR.normal(0, 30, first.shape))
    return first, (first + noise).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(("n", "m"), [(40, 60), (5, 9)])
def test_fid_is_the_formula_with_scipy_s_matrix_root(n, m):
    a = GENERATOR.normal(0, 1, (n, 8)) @ GENERATOR.normal(0, 1, (8, 8)) + 0.3
    b = GENERATOR.normal(0, 1, (m, 8))
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(s @ t).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * root)
    found = formulas.frechet_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert found == pytest.approx(expected, rel=1e-5)
    assert expected > 1


def test_fid_of_equal_sets_is_zero_and_of_one_picture_is_an_error():
    features = torch.randn(30, 6)
    assert formulas.frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="two images a side or more, got 1 and 30"):
        formulas.frechet_distance(features[:1], features)


def test_the_inception_score_is_the_formula_over_ten_parts_and_repeats():
    logits = 3 * torch.randn(60, 7, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        order = torch.randperm(60)
    probabilities = logits.softmax(1)[order].numpy()
    scores = []
    for part in np.split(probabilities, 10):
        scores.append(math.exp(np.mean((part * np.log(part / part.mean(0))).sum(1))))
    before = torch.random.get_rng_state()
    mean, deviation, parts = formulas.inception_score(logits.log_softmax(1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (mean, parts) == (pytest.approx(np.mean(scores), rel=1e-9), 10)
    assert deviation == pytest.approx(np.std(scores, ddof=1), rel=1e-9)
    assert mean > 1.5


def test_psnr_and_ssim_are_scikit_image_s():
    first, second = pictures()
    psnr, ssim = formulas.psnr(first, second), formulas.ssim(first, second)
    for number in range(len(first)):
        a, b = (p[number].permute(1, 2, 0).numpy() for p in (first, second))
        assert float(psnr[number]) == pytest.approx(peak_signal_noise_ratio(a, b), rel=1e-6)
        # scikit-image leaves a border of 5 px out of the mean; torchmetrics mirrors the image there and counts it.
        wider = [np.pad(side, ((5, 5), (5, 5), (0, 0)), mode="reflect") for side in (a, b)]
        _, whole = structural_similarity(
            *wider,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
            full=True,
        )
        expected = whole[5:-5, 5:-5].mean()
        assert float(ssim[number]) == pytest.approx(expected, abs=1e-6)
        assert expected < 0.95


def test_equal_pictures_have_the_largest_psnr_and_other_bounds():
    first, _ = pictures()
    assert formulas.psnr(first, first).tolist() == [formulas.LARGEST_PSNR] * 3
    assert formulas.ssim(first, first).tolist() == pytest.approx([1] * 3)
    assert formulas.rmse(first, first).tolist() == [0] * 3
    black, white = torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    assert formulas.rmse(black, white).item() == 1
    assert formulas.psnr(black, white).item() == pytest.approx(0, abs=1e-5)


def test_rmse_and_psnr_say_the_same():
    first, second = pictures()
    assert (-20 * formulas.rmse(first, second).log10()).tolist() == pytest.approx(
        formulas.psnr(first, second).tolist(), rel=1e-6
    )


def test_ssim_of_pictures_smaller_than_its_window_is_an_error():
    small = torch.zeros(1, 3, 10, 40, dtype=torch.uint8)
    with pytest.raises(ValueError, match="window of 11 x 11 px, got images of 10 x 40"):
        formulas.ssim(small, small)


def test_cosines_are_numpy_s_times_100():
    a, b = torch.randn(5, 9), torch.randn(5, 9)
    expected = [
        100 * np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a.numpy(), b.numpy(), strict=True)
    ]
    assert formulas.cosines(a, b).tolist() == pytest.approx(expected, rel=1e-5)


def written_out(state, taken, strides, weights, first, second):
    """LPIPS in float64 by torch's functions, layer by layer."""
    f = torch.nn.functional
    mean, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    maps = []
    for picture in (first, second):
        out, own, number = ((picture.double() / 127.5 - 1) - mean.view(3, 1, 1)) / scale.view(3, 1, 1), [], 0
        for layer in strides:
            if layer is None:
                out = f.max_pool2d(out, 3, 2) if len(strides) < 10 else f.max_pool2d(out, 2, 2)
                continue
            index, stride, padding = layer
            weight, bias = (state[f"features.{index}.{kind}"].double() for kind in ("weight", "bias"))
            out = f.conv2d(out, weight, bias, stride, padding).relu()
            if number in taken:
                own.append(out / (out.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
            number += 1
        maps.append(own)
    each = [((a - b) ** 2 * w.double()).sum(1).mean((1, 2)) for a, b, w in zip(*maps, weights, strict=True)]
    return torch.stack(each).sum(0)


ALEX = [(0, 4, 2), None, (3, 1, 2), None, (6, 1, 1), (8, 1, 1), (10, 1, 1)]
VGG = [
    *((0, 1, 1), (2, 1, 1), None, (5, 1, 1), (7, 1, 1), None, (10, 1, 1), (12, 1, 1), (14, 1, 1), None),
    *((17, 1, 1), (19, 1, 1), (21, 1, 1), None, (24, 1, 1), (26, 1, 1), (28, 1, 1)),
]


@pytest.mark.parametrize(("kind", "layers", "taken"), [("alex", ALEX, (0, 1, 2, 3, 4)), ("vgg", VGG, (1, 3, 6, 9, 12))])
def test_lpips_is_the_formula_written_out(kind, layers, taken):
    from flexclear.evaluation.lpips import NETWORKS

    torch.manual_seed(3)
    network, _ = NETWORKS[kind]()
    state = {f"features.{name}": value for name, value in network.state_dict().items()}
    first, second = pictures(2, 40, 48)
    distance = LearnedDistance({**state, "classifier.0.weight": torch.zeros(2)})
    assert distance.kind == kind
    with torch.no_grad():
        found = distance(*(p.float() / 127.5 - 1 for p in (first, second)))
        same = distance(*(p.float() / 127.5 - 1 for p in (first, first)))
    expected = written_out(state, taken, layers, learned_weights(kind), first, second)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert same.tolist() == [0, 0]
    assert expected.min() > 1e-4


def test_lpips_of_another_network_is_an_error():
    with pytest.raises(ValueError, match=r"AlexNet or VGG-16; features.0.weight here is \(8, 3, 3, 3\)"):
        LearnedDistance({"features.0.weight": torch.zeros(8, 3, 3, 3)})
