"""A model that flexclear has never heard of: declared in a few lines, checked, transformed.

    python examples/own_model.py                 # needs the extra testing: pip install 'flexclear[testing]'

Replace ``MyTransformer2DModel`` with your own class, and change the declaration until ``check_family`` passes. docs/families.md
explains each field of a declaration.
"""

import flexclear
import torch
import torch.nn.functional as F
from flexclear.families import TokensFamily, register
from flexclear.testing import check_family
from torch import Tensor, nn

HEADS, HEAD_DIM = 2, 32
WIDTH = HEADS * HEAD_DIM


class MyAttnProcessor:
    """Attention over text and image together, called like diffusers' processors."""

    def __call__(self, attn: nn.Module, tokens: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value = (
            layer(tokens).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        out = F.scaled_dot_product_attention(query, key, value)  # flexclear replaces this function
        return attn.to_out(out.transpose(1, 2).flatten(2))


def rotate(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = tensor.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class MyAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim = HEADS, HEAD_DIM  # flexclear chooses blocks by these
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.processor = MyAttnProcessor()

    def set_processor(self, processor) -> None:
        self.processor = processor

    def forward(self, tokens: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        return self.processor(self, tokens, rotary)


class MyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), MyAttention()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, tokens: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens), rotary)
        return tokens + self.mlp(self.norm2(tokens))


class MyRotaryEmbedding(nn.Module):
    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        frequencies = torch.logspace(0, -2, HEAD_DIM // 4, device=ids.device)
        angles = (ids[:, 1:, None] * frequencies).flatten(1)  # of row and column
        return angles.cos(), angles.sin()


class MyTransformer2DModel(nn.Module):
    """Text first, then the image: ``hidden_states`` ``[B, tokens, C]``, ``encoder_hidden_states`` ``[B, T, C]``, and
    ``img_ids`` ``[tokens, 3]`` with (index, row, column) of each image token."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.img_in, self.txt_in, self.proj_out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.pos_embed = MyRotaryEmbedding()
        self.transformer_blocks = nn.ModuleList(MyBlock() for _ in range(layers))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, img_ids: Tensor) -> tuple[Tensor]:
        text_len = encoder_hidden_states.shape[1]
        tokens = torch.cat([self.txt_in(encoder_hidden_states), self.img_in(hidden_states)], dim=1)
        rotary = self.pos_embed(torch.cat([img_ids.new_zeros(text_len, 3), img_ids]))
        for block in self.transformer_blocks:
            tokens = block(tokens, rotary)
        return (self.proj_out(tokens[:, text_len:]),)


DECLARATION = TokensFamily(
    model_class="MyTransformer2DModel",
    processors=("MyAttnProcessor",),  # the classes whose code attends
    stacks={"transformer_blocks": "attn"},  # the blocks, and the attention module in each
    carriers=("pos_embed",),  # its output reaches every block as an argument and carries a call's plan
    text_first=True,
)


def example_call(height: int, width: int, text_len: int = 7, batch: int = 2) -> dict[str, Tensor]:
    """Arguments of one call, as a pipeline would make them."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return {
        "hidden_states": torch.randn(batch, height * width, WIDTH, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text_len, WIDTH, generator=generator),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float(),
    }


def main() -> None:
    torch.manual_seed(0)
    register(DECLARATION)
    model = MyTransformer2DModel().eval()

    # Compares outputs, gradients, compiled blocks and ``restore`` with the plain model under the window's dense mask.
    # A grid that is not square and two samples reveal mixed-up axes and batches.
    print(check_family(model, example_call(9, 13), grid=(9, 13)))

    flexclear.transform(model, r=4)
    print(flexclear.explain(model))


if __name__ == "__main__":
    main()
