"""VisionTransformer: against a plain one and torch's own, stochastic depth, weights of a MAE."""

import copy
import inspect
import pickle
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from encoders import plain_vit, small_vit, with_random_weights
from support import BATCHES, IMAGES, NATIVE, SIZES, Results, assert_results, attends_otherwise, images_for, small_mae, widened
from torch import Tensor, nn

import maefast
from maefast import VisionTransformer, blocks, models_vit

F32, BF16, U8 = torch.float32, torch.bfloat16, torch.uint8
MODELS = {
    "class_token": {},
    "global_pool": {"global_pool": True},
    "drop_path": {"global_pool": True, "drop_path_rate": 0.4},
    "dropout": {"drop_rate": 0.2, "drop_path_rate": 0.3},
    "four_channels": {"in_chans": 4, "img_size": 30, "patch_size": 10},
}


def classify(model: nn.Module, imgs: Tensor, seed: int, mode: str = "fp32") -> Results:
    """The logits, and the gradient of every parameter for a fixed gradient of the logits."""
    model.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast("cpu", BF16) if mode == "autocast" else nullcontext():
        logits = model(imgs)
    logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed)).to(logits.dtype))
    return {"logits": logits.detach()} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_against_a_plain_one(options, mode):
    """Logits and all gradients; what training drops is the same for one seed."""
    plain = with_random_weights(plain_vit(**options))
    model = small_vit(seed=9, **options)
    model.load_state_dict(plain.state_dict())
    if mode == "bf16":
        model, plain = model.bfloat16(), plain.bfloat16()
    dtype = BF16 if mode == "bf16" else F32
    assert_like_plain(model, plain, lambda seed: 2 * [images_for(model, IMAGES, dtype, seed)], mode)


def assert_like_plain(model: nn.Module, plain: nn.Module, images: Callable[[int], list[Tensor]], mode: str = "fp32") -> None:
    """Hold the model to the error rule on images(seed): its own, the plain one's, maybe float64."""
    other, exact = attends_otherwise(plain), copy.deepcopy(plain).double()
    batches = []
    for seed in range(BATCHES):
        imgs, pixels, *wide = images(seed)
        eager = [classify(m, pixels, seed, mode) for m in (plain, other)]
        batches.append((classify(model, imgs, seed, mode), eager, classify(exact, *(wide or [pixels.double()]), seed)))
    assert_results(batches)


def test_against_torch_s_own_encoder():
    """In float64, against another implementation of the same mathematics."""
    model = with_random_weights(small_vit()).double().eval()
    names = {"attn.proj": "self_attn.out_proj", "mlp.fc1": "linear1", "mlp.fc2": "linear2", "attn.qkv.": "self_attn.in_proj_"}
    layers = []
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(32, 4, 128, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True, dtype=torch.float64)
        weights = block.state_dict()
        for old, new in names.items():
            weights = {name.replace(old, new): tensor for name, tensor in weights.items()}
        layer.load_state_dict(weights)
        layers.append(layer)
    imgs = images_for(model).double()
    x = model.patch_embed.proj(imgs).flatten(2).transpose(1, 2)
    x = torch.cat([model.cls_token.expand(2, 1, -1), x], dim=1) + model.pos_embed
    for layer in layers:
        x = layer(x)
    features = nn.functional.layer_norm(x[:, 0], (32,), model.norm.weight, model.norm.bias, 1e-6)
    torch.testing.assert_close(model.forward_features(imgs), features, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model(imgs), features @ model.head.weight.T + model.head.bias, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SIZES)
def test_factories(name):
    D, depth, heads, p = SIZES[name]
    L, P = (224 // p) ** 2, 3 * p * p
    block = 2 * 2 * D + (3 * D * D + 3 * D) + (D * D + D) + (4 * D * D + 4 * D) + (4 * D * D + D)
    with torch.device("meta"):
        model = models_vit.__dict__[f"vit_{name}_patch{p}"](global_pool=True, num_classes=10, drop_path_rate=0.1)
    assert sum(t.numel() for t in model.parameters()) == P * D + D + D + (1 + L) * D + depth * block + 2 * D + 10 * D + 10
    assert model.blocks[0].attn.num_heads == heads
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert not hasattr(model, "norm")


def test_official_module_names():
    assert set(models_vit.__all__) == {f"vit_{name}_patch{p}" for name, (*_, p) in SIZES.items()} | {"VisionTransformer"}
    assert models_vit.VisionTransformer is maefast.VisionTransformer
    parameters = inspect.signature(VisionTransformer.__init__).parameters
    defaults = {
        "img_size": 224, "patch_size": 16, "in_chans": 3, "num_classes": 1000, "embed_dim": 768, "depth": 12, "num_heads": 12,
        "mlp_ratio": 4.0, "qkv_bias": True, "drop_rate": 0.0, "drop_path_rate": 0.0, "norm_layer": None, "global_pool": False,
    }  # fmt: skip
    assert {name: parameters[name].default for name in defaults} == defaults


def test_a_seed_gives_the_weights_of_timm_s_initialisation():
    """trunc_normal 0.02 for Linear weights, class token and positions; biases 0."""
    model, plain = small_vit(embed_dim=256, global_pool=True), plain_vit(embed_dim=256, global_pool=True)
    assert model.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    for name in ("pos_embed", "blocks.1.attn.qkv.weight", "blocks.2.mlp.fc2.weight", "head.weight"):
        assert 0.018 < model.get_parameter(name).std() < 0.022, name
    assert model.head.bias.abs().max() == model.blocks[0].attn.qkv.bias.abs().max() == 0
    bound = (3 * 8 * 16) ** -0.5
    assert 0.9 * bound < model.patch_embed.proj.weight.abs().max() <= bound
    assert all(p.requires_grad for p in model.parameters())
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}


def test_without_biases_of_qkv():
    model = small_vit(qkv_bias=False)
    other = small_vit(seed=1)
    assert other.load_state_dict(model.state_dict(), strict=False).missing_keys == [f"blocks.{i}.attn.qkv.bias" for i in range(3)]
    imgs = images_for(model)
    torch.testing.assert_close(model(imgs), other(imgs), rtol=1e-5, atol=1e-6)


def test_drop_path_by_hand():
    """Whole samples are dropped, the others divided by the probability of being kept."""
    y = torch.randn(1000, 3, 2)
    torch.manual_seed(4)
    kept = torch.empty(1000, 1, 1).bernoulli_(0.75).bool().flatten()
    torch.manual_seed(4)
    out = blocks.drop_path(y, 0.25)
    assert 700 < kept.sum() < 800
    assert out[~kept].abs().max() == 0
    torch.testing.assert_close(out[kept], y[kept] / 0.75)
    assert blocks.drop_path(y.bfloat16(), 0.25).dtype == BF16


def test_drop_path_rises_linearly():
    assert [block.drop_path for block in small_vit(drop_path_rate=0.3).blocks] == pytest.approx([0, 0.15, 0.3])
    assert [block.drop_path for block in small_vit(drop_path_rate=0.3, depth=1).blocks] == [0]


def test_blocks_are_fused_where_nothing_is_dropped():
    def route(block: blocks.Block) -> blocks.Route:
        return block.route(torch.device("cpu"), torch.float32, tokens=25)[0]

    fused = blocks.Route.FUSED if NATIVE else blocks.Route.MODULES
    for options in ({"drop_path_rate": 0.4}, {"drop_rate": 0.4}):
        model = small_vit(**options)
        assert route(model.blocks[0]) == (fused if "drop_path_rate" in options else blocks.Route.MODULES)
        assert route(model.blocks[2]) == (blocks.Route.OPS if "drop_path_rate" in options else blocks.Route.MODULES)
        model.eval()
        assert all(route(block) == fused for block in model.blocks)
        imgs = images_for(model)
        assert torch.equal(model(imgs), small_vit()(imgs))


def test_dropped_blocks_with_a_hook_are_the_same():
    """The route through the modules draws what the route through the ops draws."""
    model, watched = (with_random_weights(small_vit(drop_path_rate=0.5)) for _ in range(2))
    seen = []
    watched.blocks[2].mlp.fc1.register_forward_hook(lambda module, args, out: seen.append(module))
    imgs = images_for(model, N=8)
    got, expected = classify(watched, imgs, 5), classify(model, imgs, 5)
    assert seen == [watched.blocks[2].mlp.fc1]
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiles_as_one_graph():
    """Stochastic depth included, whose draws under aot_eager are those of eager."""
    model = with_random_weights(small_vit(drop_path_rate=0.5, global_pool=True))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    imgs = images_for(model, N=4)
    expected, got = classify(model, imgs, 6), classify(compiled, imgs, 6)
    for name, value in expected.items():
        torch.testing.assert_close(got[name if name == "logits" else f"_orig_mod.{name}"], value, rtol=1e-4, atol=1e-5)


HEAD, FC_NORM, NORM = ({f"{name}.{kind}" for kind in ("weight", "bias")} for name in ("head", "fc_norm", "norm"))


@pytest.mark.parametrize("global_pool", [True, False])
def test_weights_of_a_mae(global_pool):
    mae = small_mae(depth=3, seed=5)
    model = small_vit(global_pool=global_pool)
    report = model.load_state_dict(mae.state_dict(), strict=False)
    assert set(report.missing_keys) == HEAD | (FC_NORM if global_pool else set())
    decoder = {name for name in mae.state_dict() if name.startswith(("decoder", "mask_token"))}
    assert set(report.unexpected_keys) == decoder | (NORM if global_pool else set())
    imgs = images_for(model, dtype=U8)
    tokens = mae.encode(imgs)
    maps = model.features(imgs)[0].flatten(2).transpose(1, 2)
    torch.testing.assert_close(mae.norm(maps), tokens[:, 1:])
    if global_pool:
        torch.testing.assert_close(model.forward_features(imgs), nn.functional.layer_norm(maps.mean(dim=1), (32,), eps=1e-6))
    else:
        torch.testing.assert_close(model.forward_features(imgs), tokens[:, 0])
        encoder = {name: value for name, value in mae.state_dict().items() if name not in report.unexpected_keys}
        assert set(model.load_state_dict(encoder, strict=False).unexpected_keys) == set()


def test_a_linear_probe():
    """The head behind a BatchNorm, all else frozen: only the head gets a gradient."""
    model = small_vit()
    model.head = nn.Sequential(nn.BatchNorm1d(model.head.in_features, affine=False, eps=1e-6), model.head)
    for p in model.parameters():
        p.requires_grad_(False)
    for p in model.head.parameters():
        p.requires_grad_(True)
    imgs = images_for(model, N=6)
    logits = model(imgs)
    x = model.forward_features(imgs)
    x = (x - x.mean(dim=0)) / (x.var(dim=0, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(logits, x @ model.head[1].weight.T + model.head[1].bias, rtol=1e-4, atol=1e-5)
    logits.sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"head.1.weight", "head.1.bias"}


def test_without_a_head():
    model = small_vit(num_classes=0)
    imgs = images_for(model)
    assert torch.equal(model(imgs), model.forward_features(imgs))
    assert not [name for name, _ in model.named_parameters() if name.startswith("head")]


def test_uint8_images_are_normalised_ones():
    model, plain = (with_random_weights(m) for m in (small_vit(), plain_vit()))

    def images(seed: int) -> list[Tensor]:
        imgs = images_for(model, IMAGES, U8, seed)
        pixels = (imgs.float() / 255 - model.mean[:, None, None]) / model.std[:, None, None]
        return [imgs, pixels, widened(imgs, model.mean, model.std)]

    assert_like_plain(model, plain, images)
    assert not {"mean", "std"} & model.state_dict().keys()
    assert model.bfloat16().mean.dtype == F32


def test_copies_and_pickles():
    model = small_vit(global_pool=True, drop_path_rate=0.1)
    imgs = images_for(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.eval()(imgs), model.eval()(imgs))


NO_STATISTICS = "mean and std must be given to VisionTransformer for uint8 images of 2 channels"
BAD_INPUT = {
    "image_size": (lambda m: m(torch.rand(2, 3, 64, 64)), ValueError, r"imgs must be \(N, 3, 64, 48\).*\(2, 3, 64, 64\)"),
    "image_dtype": (lambda m: m(torch.zeros(2, 3, 64, 48, dtype=torch.int32)), TypeError, "imgs must be.*uint8.*int32"),
    "size": (lambda m: m.features(torch.rand(2, 3, 64, 40)), ValueError, r"imgs must be .*multiple of 8 and W of 16.*64, 40\)"),
    "map_channels": (lambda m: m.features(torch.rand(2, 1, 64, 48)), ValueError, r"imgs must be \(N, 3, H, W\)"),
    "map_without_rows": (lambda m: m.features(torch.rand(2, 3, 0, 48)), ValueError, r"imgs must be .*\(2, 3, 0, 48\)"),
    "map_three_dimensions": (lambda m: m.features(torch.rand(3, 64, 48)), ValueError, r"imgs must be .*\(3, 64, 48\)"),
    "map_dtype": (lambda m: m.features(torch.zeros(2, 3, 64, 48, dtype=torch.int32)), TypeError, "imgs must be.*int32"),
    "no_such_block": (lambda m: m.features(torch.rand(2, 3, 64, 48), [0, 3]), ValueError, r"blocks must be in \[-3, 3\).*3"),
    "drop_path_rate": (lambda m: small_vit(drop_path_rate=1.0), ValueError, r"drop_path_rate must be in \[0, 1\); it is 1.0"),
    "drop_rate": (lambda m: small_vit(drop_rate=-0.1), ValueError, r"drop_rate must be in \[0, 1\); it is -0.1"),
    "num_classes": (lambda m: small_vit(num_classes=-1), ValueError, "num_classes must be 0 or more; it is -1"),
    "uint8_without_statistics": (lambda m: small_vit(in_chans=2)(torch.zeros(1, 2, 64, 48, dtype=U8)), ValueError, NO_STATISTICS),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(small_vit())
