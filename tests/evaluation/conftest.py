"""Images, and small networks with random weights, as files in a folder."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from helpers.evaluation_pictures import disturbed, picture

WORDS = ["a", "red", "apple", "blue", "cat", "on", "white", "background"]


@pytest.fixture
def folders(tmp_path):
    """Two folders of six images each, pairs by name, one of the names in a folder below."""
    a, b = tmp_path / "a", tmp_path / "b"
    (a / "more").mkdir(parents=True)
    (b / "more").mkdir(parents=True)
    for number in range(6):
        name = f"{number:02d}" if number < 5 else "more/05"
        image = picture(number)
        image.save(b / f"{name}.png")
        disturbed(image, 100 + number).save(a / f"{name}.png")
    return a, b


class TinyInception(nn.Module):
    """Takes the arguments of the TorchScript file of Inception v3."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 5, 3)
        self.output = nn.Linear(4, 7)

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        features = self.convolution(img.to(torch.float32) / 255).relu().mean([2, 3])
        if return_features:
            return features
        logits = nn.functional.linear(features, self.output.weight) if no_output_bias else self.output(features)
        return (20 * logits).softmax(1)


@pytest.fixture(scope="session")
def networks(tmp_path_factory):
    """Files and folders of small networks, by name."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(1)
    inception = TinyInception().eval()
    with torch.no_grad():
        inception.convolution.weight.mul_(3)
    torch.jit.script(inception).save(str(folder / "inception.pt"))
    alexnet = {
        name: 0.05 * torch.randn(shape)
        for name, shape in {
            "features.0.weight": (64, 3, 11, 11),
            "features.3.weight": (192, 64, 5, 5),
            "features.6.weight": (384, 192, 3, 3),
            "features.8.weight": (256, 384, 3, 3),
            "features.10.weight": (256, 256, 3, 3),
        }.items()
    }
    biases = {name.replace("weight", "bias"): 0.1 * torch.randn(len(weight)) for name, weight in alexnet.items()}
    torch.save({**alexnet, **biases, "classifier.1.bias": torch.zeros(3)}, folder / "alexnet.pth")
    _save_clip(folder / "clip")
    _save_dino(folder / "dino")
    return {
        "inception": folder / "inception.pt",
        "lpips": folder / "alexnet.pth",
        "clip": folder / "clip",
        "dino": folder / "dino",
    }


def _save_clip(folder):
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    text = {
        "vocab_size": 600,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    _lively(model).save_pretrained(folder)
    characters = sorted({character for word in WORDS for character in word})
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *characters, *(f"{c}</w>" for c in characters)]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12).save_pretrained(folder)
    _processor(folder, "CLIPImageProcessor")


def _save_dino(folder):
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, mlp_ratio=2
    )
    _lively(Dinov2Model(config)).save_pretrained(folder)
    _processor(folder, "BitImageProcessor")


def _lively(model):
    """Larger weights than initial ones, so that other inputs make other outputs."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.4)
    return model.eval()


def _processor(folder, kind):
    import transformers

    made = getattr(transformers, kind)(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    made.save_pretrained(folder)
