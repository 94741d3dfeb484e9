"""The decoder's training with inpainting channels: what is known comes to be used."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch

from models.clip_config import ClipDims
from models.decoder.config import DecoderConfig, TextAdapterConfig
from models.decoder.inpainting import known_planes
from models.decoder.network import Decoder
from models.diffusion.config import DiffusionConfig
from models.diffusion.process import Diffusion
from models.layers.config import UNetConfig
from models.sample_random import SampleRandom
from models.text import TextEncoding
from pipeline.data.batch import Batch
from pipeline.networks.decoder import DecoderObjective

DIMS = ClipDims(embed_dim=8, text_width=8, context_length=8)
UNET = UNetConfig(
    channels=16,
    channel_mults=(1,),
    num_res_blocks=1,
    attention_resolutions=(8,),
    head_channels=8,
    norm_groups=4,
    dropout=0.0,
)


def _no_captions(captions: Sequence[str]) -> TextEncoding:
    size = len(captions)
    mask = torch.ones(size, 2, dtype=torch.bool)
    tokens = torch.zeros(size, 2, dtype=torch.int64)
    return TextEncoding(torch.zeros(size, 8), torch.zeros(size, 2, 8), mask, tokens)


def _flat_pictures(size: int, generator: torch.Generator) -> Batch:
    """Pictures of one random colour each, whose z_image says nothing of it."""
    colours = torch.randint(256, (size, 1, 1, 3), generator=generator, dtype=torch.uint8)
    names = tuple(str(number) for number in range(size))
    return Batch(names, names, colours.expand(size, 8, 8, 3).contiguous(), torch.ones(size, 8) / 8**0.5)


def test_decoder_with_inpainting_channels_learns_to_continue_the_known_part() -> None:
    torch.manual_seed(0)
    diffusion = DiffusionConfig(prediction="x0")
    config = DecoderConfig(image_px=8, context_width=8, unet=UNET, inpainting=True, diffusion=diffusion)
    decoder = Decoder(config, DIMS)
    objective, generator = DecoderObjective(decoder, _no_captions).train(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    for step in range(120):
        optimizer.zero_grad()
        objective(_flat_pictures(16, generator), SampleRandom.of_samples(step, range(16))).backward()
        optimizer.step()

    batch, t = _flat_pictures(32, generator), torch.full((32,), 999)
    x0 = batch.require_images().permute(0, 3, 1, 2).float() / 127.5 - 1
    noised = Diffusion(diffusion).q_sample(x0, t, torch.randn(x0.shape, generator=generator))
    region = torch.zeros(32, 1, 8, 8, dtype=torch.bool)
    region[..., 4:] = True
    errors = []
    for condition_planes in (None, known_planes(x0, region)):
        condition = decoder.encode_condition(
            batch.require_z_image(), _no_captions(batch.captions), planes=condition_planes
        )
        with torch.no_grad():
            errors.append((decoder(noised, t, condition) - x0)[..., 4:].pow(2).mean().item())
    assert errors[1] < 0.35 * errors[0]


def test_without_inpainting_channels_their_fields_change_nothing() -> None:
    losses = []
    for unknown_prob in (0.0, 1.0):
        torch.manual_seed(0)
        config = DecoderConfig(image_px=8, context_width=8, unet=UNET, unknown_prob=unknown_prob)
        objective = DecoderObjective(Decoder(config, DIMS), _no_captions)
        batch = _flat_pictures(4, torch.Generator().manual_seed(2))
        losses.append(objective(batch, SampleRandom.of_samples(1, range(4))).item())
    assert losses[0] == losses[1]


def _losses(pooled_drop_prob: float, *, training: bool) -> list[float]:
    """The losses of two batches that differ in z_image alone."""
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(image_px=8, context_width=8, unet=UNET, pooled_drop_prob=pooled_drop_prob), DIMS)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    objective = DecoderObjective(decoder, _no_captions).train(training)
    batch = _flat_pictures(16, torch.Generator().manual_seed(2))
    batches = (batch, dataclasses.replace(batch, z_image=-batch.require_z_image()))
    return [objective(part, SampleRandom.of_samples(1, range(16))).item() for part in batches]


def test_pooled_vectors_are_dropped_in_training_alone() -> None:
    kept, dropped = _losses(0.0, training=True), _losses(1.0, training=True)
    assert kept[0] != kept[1]
    assert dropped[0] == dropped[1]
    validation = _losses(1.0, training=False)
    assert validation[0] != validation[1]
    assert validation == _losses(0.0, training=False)


_WITH_SKETCH = DecoderConfig(
    image_px=8,
    context_width=8,
    unet=UNET,
    sketch_px=2,
    text_drop_prob=0.0,
    text_adapter=TextAdapterConfig(depth=1, head_width=4),
)


def _read(captions: Sequence[str]) -> TextEncoding:
    """A token that begins each caption, and one whose state says which it is."""
    size = len(captions)
    hidden = torch.zeros(size, 2, 8)
    hidden[:, 1, 0] = torch.tensor([2.0 * (caption == "right") - 1.0 for caption in captions])
    tokens = torch.zeros(size, 2, dtype=torch.int64)
    return TextEncoding(torch.zeros(size, 8), hidden, torch.ones(size, 2, dtype=torch.bool), tokens)


def _half_white(size: int, generator: torch.Generator) -> Batch:
    """Pictures of which the half that the caption names is white; z_image is the same for all."""
    names = tuple(("left", "right")[int(number)] for number in torch.randint(2, (size,), generator=generator))
    images = torch.zeros(size, 8, 8, 3, dtype=torch.uint8)
    for image, name in zip(images, names, strict=True):
        image[:, slice(4) if name == "left" else slice(4, 8)] = 255
    return Batch(names, names, images, torch.ones(size, 8) / 8**0.5)


def test_a_decoder_with_a_sketch_learns_from_the_caption_where_things_stand() -> None:
    torch.manual_seed(0)
    decoder = Decoder(_WITH_SKETCH, DIMS)
    objective, generator = DecoderObjective(decoder, _read).train(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    for step in range(200):
        optimizer.zero_grad()
        objective(_half_white(16, generator), SampleRandom.of_samples(step, range(16))).backward()
        optimizer.step()
    z_image = torch.ones(2, 8) / 8**0.5
    sketch = decoder.encode_condition(z_image, _read(["left", "right"])).sketch
    assert sketch is not None
    columns = sketch.mean((1, 2))  # of each picture, the left and the right one
    assert columns[0, 0] - columns[0, 1] > 1
    assert columns[1, 1] - columns[1, 0] > 1


def test_the_error_of_the_sketch_is_no_part_of_the_validation_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    decoder, batch = Decoder(_WITH_SKETCH, DIMS), _half_white(4, torch.Generator().manual_seed(2))
    objective, losses = DecoderObjective(decoder, _read), dict[tuple[float, bool], float]()
    for weight in (0.0, 1.0):
        monkeypatch.setattr("pipeline.networks.decoder._SKETCH_WEIGHT", weight)
        for training in (True, False):
            random = SampleRandom.of_samples(1, range(4))
            losses[weight, training] = objective.train(training)(batch, random).item()
    assert losses[1.0, False] == losses[0.0, False]
    assert losses[1.0, True] > losses[0.0, True] + 0.1
