"""SimpleFeaturePyramid: maps of four scales from the one scale of a plain Vision Transformer."""

from torch import Tensor, nn

from . import ops


class SimpleFeaturePyramid(nn.Module):
    """The pyramid of Li et al. 2022, "Exploring Plain Vision Transformer Backbones for Object
    Detection", section 3.

    dim             width D of the encoder, a multiple of 4, or a ValueError is raised
    out_channels    of every map

    The last map of `VisionTransformer.features`, whose stride is the patch p, becomes maps of
    strides p/4, p/2, p and 2p, by transposed convolutions or max pooling. A 1 x 1 and a 3 x 3
    convolution without bias follow, each with a LayerNorm over channels.
    """

    def __init__(self, dim: int, out_channels: int = 256):
        super().__init__()
        if dim < 4 or dim % 4:
            raise ValueError(f"dim must be a positive multiple of 4; it is {dim}")
        half, quarter = dim // 2, dim // 4
        resized: tuple[tuple[list[nn.Module], int], ...] = (  # layers that change the scale, width
            ([_doubled(dim, half), ChannelNorm(half), nn.GELU(), _doubled(half, quarter)], quarter),
            ([_doubled(dim, half)], half),
            ([], dim),
            ([nn.MaxPool2d(2)], dim),
        )
        self.dim = dim
        self.levels = nn.ModuleList(nn.Sequential(*layers, *_projected(width, out_channels)) for layers, width in resized)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return four maps (N, out_channels, ...) of x (N, D, h, w), h and w 2 or more: of sizes
        (4h, 4w), (2h, 2w), (h, w), (h // 2, w // 2). Raises ValueError for any other shape."""
        if x.dim() != 4 or x.shape[1] != self.dim or min(x.shape[2:]) < 2:
            raise ValueError(f"x must be (N, {self.dim}, h, w) with h and w 2 or more; its shape is {tuple(x.shape)}")
        return [level(x) for level in self.levels]


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, H, W), eps 1e-6."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x.movedim(1, -1), self.weight, self.bias, self.eps).movedim(-1, 1)


def _doubled(in_channels: int, out_channels: int) -> nn.Module:
    return nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2)


def _projected(in_channels: int, out_channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False),
        ChannelNorm(out_channels),
        nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
        ChannelNorm(out_channels),
    ]
