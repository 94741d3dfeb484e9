"""The UNet: shapes, context, and what starts at zero."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import UNET, randomise
from torch.utils._python_dispatch import TorchDispatchMode

from models.layers.config import UNetConfig
from models.layers.unet import ResBlock, UNet, enlarge, group_norm, set_checkpointing

CONFIG = replace(UNET, num_res_blocks=2)


@pytest.fixture
def unet() -> UNet:
    torch.manual_seed(0)
    model = UNet(CONFIG, 8, 3, 6, context_width=10).eval()
    randomise(model)
    return model


def inputs(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 3, 8, 8), torch.arange(batch) * 10


def test_unet_starts_at_zero_with_identity_blocks() -> None:
    model = UNet(CONFIG, 8, 3, 6, context_width=10)
    x, t = inputs()
    assert not model(x, t, context=model.encode_context(torch.randn(2, 5, 10))).any()
    block = model.down[0].block
    features = torch.randn(2, 8, 8, 8)
    assert torch.equal(block(features, torch.randn(2, model.width)), features)


def test_unet_shape_at_other_sizes_and_channels(unet: UNet) -> None:
    x = torch.randn(1, 3, 12, 20)
    context = unet.encode_context(torch.randn(1, 5, 10))
    assert unet(x, torch.zeros(1, dtype=torch.long), context=context).shape == (1, 6, 12, 20)


def test_unet_has_attention_where_the_paper_has() -> None:
    sides = (64, 32, 16, 8)
    config = UNetConfig(channels=8, head_channels=8, norm_groups=4, attention_resolutions=(32, 16, 8))
    model = UNet(config, 64, 3, 6, context_width=4)
    with_attention = [stage.attention is not None for stage in model.down]
    level = [True] * config.num_res_blocks
    expected = [[side in (32, 16, 8)] * len(level) + [False] for side in sides]
    assert with_attention == [one for part in expected for one in part][:-1]
    assert model.middle[0].attention is not None
    assert model.middle[1].attention is None


def test_unet_without_attention_has_none_in_the_middle_either() -> None:
    config = UNetConfig(channels=8, norm_groups=4, attention_resolutions=())
    model = UNet(config, 64, 6, 3)
    assert not any("attention" in name for name, _ in model.named_parameters())


def test_unet_reads_valid_context_tokens_only(unet: UNet) -> None:
    x, t = inputs()
    context = torch.randn(2, 5, 10)
    valid = torch.tensor([[True] * 3 + [False] * 2] * 2)
    changed = context.clone()
    changed[:, 3:] += 1
    before = unet(x, t, context=unet.encode_context(context), valid=valid)
    masked = unet(x, t, context=unet.encode_context(changed), valid=valid)
    read = unet(x, t, context=unet.encode_context(changed), valid=torch.ones_like(valid))
    torch.testing.assert_close(before, masked, rtol=0, atol=1e-5)
    assert (before - read).abs().max() > 1e-3


def test_unet_items_do_not_depend_on_their_batch(unet: UNet) -> None:
    x, t = inputs(3)
    context = torch.randn(3, 5, 10)
    together = unet(x, t, context=unet.encode_context(context))
    alone = unet(x[1:2], t[1:2], context=unet.encode_context(context[1:2]))
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-5)


def test_unet_memory_order_changes_no_number(unet: UNet) -> None:
    x, t = inputs()
    context = unet.encode_context(torch.randn(2, 5, 10))
    quick = unet(x, t, context=context)
    plain = unet.to(memory_format=torch.contiguous_format)(x, t, context=context)
    assert quick.is_contiguous(memory_format=torch.channels_last)
    assert plain.is_contiguous()
    torch.testing.assert_close(plain, quick, rtol=0, atol=1e-4)


def test_unet_checkpointing_changes_no_gradient(unet: UNet) -> None:
    x, t = inputs()
    context = torch.randn(2, 5, 10)
    gradients = []
    for enabled in (False, True):
        assert set_checkpointing(unet, enabled=enabled) > 0
        unet.zero_grad()
        unet(x, t, context=unet.encode_context(context)).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in unet.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_unet_scale_shift_and_added_time_differ() -> None:
    shapes = []
    for time_norm in ("scale_shift", "add"):
        config = UNetConfig(channels=8, norm_groups=4, attention_resolutions=(), time_norm=time_norm)
        model = UNet(config, 64, 3, 3)
        randomise(model)
        x = torch.randn(1, 3, 16, 16)
        early, late = (model(x, torch.tensor([t])) for t in (0, 900))
        assert (early - late).abs().max() > 1e-3
        shapes.append(model.down[0].block.embedding.weight.shape)
    assert shapes == [(16, 32), (8, 32)]


def test_unet_with_patches_is_the_network_on_the_folded_picture() -> None:
    config = UNetConfig(channels=8, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(), norm_groups=4)
    folded = UNet(replace(config, patch_px=2), 16, 3, 6).eval()
    plain = UNet(config, 8, 12, 24).eval()
    randomise(folded)
    plain.load_state_dict(folded.state_dict())
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 500])
    expected = F.pixel_shuffle(plain(F.pixel_unshuffle(x, 2), t), 2)
    torch.testing.assert_close(folded(x, t), expected)
    assert folded(x, t).shape == (2, 6, 16, 16)


def test_unet_with_patches_counts_levels_in_picture_pixels_over_the_patch() -> None:
    config = UNetConfig(channels=8, channel_mults=(1, 2), attention_resolutions=(4,), head_channels=4, norm_groups=4)
    replace(config, patch_px=2).require_fits(16)
    with pytest.raises(ValueError, match="attention_resolutions"):
        replace(config, patch_px=2).require_fits(32)
    with pytest.raises(ValueError, match="not a multiple of 8"):
        replace(config, patch_px=4, attention_resolutions=()).require_fits(20)


def test_unet_tells_places_apart_only_with_position_bands() -> None:
    config = UNetConfig(channels=8, channel_mults=(1,), num_res_blocks=1, attention_resolutions=(), norm_groups=4)
    flat, t = torch.ones(1, 3, 48, 48), torch.tensor([5])
    for bands, tells in ((0, False), (2, True)):
        torch.manual_seed(0)
        net = UNet(replace(config, position_bands=bands), 48, 3, 3).eval()
        randomise(net)
        middle = net(flat, t)[0, :, 20:28, 20:28]  # farther from the border than the network reads
        assert bool((middle - middle[:, :1, :1]).abs().max() > 1e-3) is tells


def test_unet_position_bands_are_waves_down_and_across() -> None:
    config = UNetConfig(channels=8, channel_mults=(1,), num_res_blocks=1, attention_resolutions=(), norm_groups=4)
    net = UNet(replace(config, position_bands=2), 8, 1, 3)
    calls: list[torch.Tensor] = []
    net.conv_in.register_forward_pre_hook(lambda _layer, arguments: calls.append(arguments[0]))
    net(torch.zeros(1, 1, 2, 4), torch.tensor([0]))
    down, across = torch.tensor([-0.5, 0.5]), torch.tensor([-0.75, -0.25, 0.25, 0.75])  # centres of pixels in [-1, 1]
    expected = [
        wave(torch.pi * octave * place).view(shape).expand(2, 4)
        for place, shape in ((down, (2, 1)), (across, (1, 4)))
        for wave in (torch.sin, torch.cos)
        for octave in (0.5, 1.0)
    ]
    torch.testing.assert_close(calls[0][0, 1:], torch.stack(expected))


def test_unet_refuses_a_context_it_was_not_built_for() -> None:
    model = UNet(CONFIG, 8, 3, 3)
    with pytest.raises(ValueError, match="without a context"):
        model.encode_context(torch.randn(1, 2, 10))


def test_unet_with_a_context_refuses_to_run_without_it() -> None:
    model = UNet(CONFIG, 8, 3, 3, context_width=10)
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([1])
    model(x, t, context=model.encode_context(torch.randn(1, 2, 10)))
    with pytest.raises(ValueError, match="layers, and was given 0"):
        model(x, t)


def test_res_block_that_enlarges_is_a_convolution_of_the_enlarged_picture() -> None:
    config = UNetConfig(channels=8, norm_groups=4, dropout=0.0)
    block = ResBlock((8, 8), 32, config, "up")
    randomise(block)
    wide = torch.nn.functional.interpolate
    for side in (8, 16):  # below and above the side from which the two are one kernel
        x, embedding = torch.randn(2, 8, side, side), torch.randn(2, 32)
        plain = block.conv_in(wide(torch.nn.functional.silu(block.norm_in(x)), scale_factor=2.0, mode="nearest"))
        scale, shift = block.embedding(embedding)[:, :, None, None].chunk(2, dim=1)
        hidden = torch.nn.functional.silu(block.norm_out(plain) * (scale + 1) + shift)
        expected = wide(x, scale_factor=2.0, mode="nearest") + block.conv_out(hidden)
        torch.testing.assert_close(block(x, embedding), expected, rtol=1e-5, atol=1e-5)


def test_what_is_written_out_for_the_compiler_equals_torch_and_keeps_the_order_of_pixels() -> None:
    torch.manual_seed(0)
    x = (3 + torch.randn(2, 6, 5, 4)).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(6), torch.randn(6)
    pairs = [
        (lambda x: group_norm(x, 3, weight, bias, 1e-5), lambda x: F.group_norm(x, 3, weight, bias, 1e-5)),
        (enlarge, lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest")),
    ]
    for ours, torchs in pairs:
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [ours(inputs[0]), torchs(inputs[1])]
        gradient = torch.randn_like(outputs[0])
        for output in outputs:
            output.backward(gradient)
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-5)
        for tensor in (outputs[0], inputs[0].grad):
            assert tensor is not None
            assert tensor.is_contiguous(memory_format=torch.channels_last)


class ConvolutionInputs(TorchDispatchMode):
    """Strides of the channels of all that convolutions read, forward and backward, but for pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.strides: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        num_inputs = {"aten::convolution": 1, "aten::convolution_backward": 2}.get(func.name(), 0)
        self.strides += [one.stride(1) for one in args[:num_inputs] if one.shape[1] > 3]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_compiling", [True, False])
def test_compiled_unet_is_channels_last_where_the_device_norm_is_not(
    is_compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def norm_of_a_gpu(x: torch.Tensor, *args: Any) -> torch.Tensor:
        return torch.group_norm(x.contiguous(), *args)

    monkeypatch.setattr(F, "group_norm", norm_of_a_gpu)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: is_compiling)
    model = UNet(CONFIG, 8, 3, 3, context_width=10)
    x, t = inputs()
    with ConvolutionInputs() as convolutions:
        model(x, t, context=model.encode_context(torch.randn(2, 5, 10))).sum().backward()
    assert len(convolutions.strides) > 50
    assert (set(convolutions.strides) == {1}) == is_compiling
