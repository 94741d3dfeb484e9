"""Edits of pictures: what each of them keeps, and what it changes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tiny_models import CONVOLUTION, DIMS, UNET, Captions, Pictures, make_text, picture, randomise, right_half

from models.cascade import Cascade, CascadeResult
from models.decoder.config import DecoderConfig
from models.decoder.inpainting import resize_mask
from models.decoder.network import Decoder
from models.decoder.stage import X_T, DecoderStage
from models.diffusion.config import DiffusionConfig, SamplerConfig
from models.diffusion.limits import ClipRange
from models.diffusion.noise import NoiseSource
from models.diffusion.process import Diffusion
from models.diffusion.samplers import sample_along
from models.diffusion.steps import ddim_step
from models.editor import Editor, EditSettings, Latents, slerp
from models.noisy_clip.config import NoisyClipConfig
from models.noisy_clip.network import NoisyClip
from models.pixels import resize_crop, to_pixels, to_uint8
from models.prior.config import PriorConfig
from models.prior.network import Prior
from models.prior.stage import PriorStage
from models.request import EditError
from models.stage import Z_IMAGE, Batch, StageStep
from models.upsampler.config import UpsamplerConfig
from models.upsampler.network import Upsampler
from models.upsampler.stage import UpsamplerStage

SETTINGS = EditSettings(num_steps=12, num_refinements=4)


def make_cascade(*, inpainting: bool = False, clip: Captions | None = None) -> Cascade:
    torch.manual_seed(0)
    prior = Prior(PriorConfig(width=16, depth=1, num_heads=2, sampler=SamplerConfig(num_steps=2, clip_x0=False)), DIMS)
    config = DecoderConfig(
        image_px=8,
        context_width=6,
        unet=UNET,
        inpainting=inpainting,
        diffusion=DiffusionConfig(prediction="v", variance="learned_range"),
        sampler=SamplerConfig(num_steps=4, guidance_scale=1.5),
    )
    decoder = Decoder(config, DIMS)
    ddim = SamplerConfig(method="ddim", num_steps=2, eta=0.5)
    upsampler = Upsampler(UpsamplerConfig(image_px=16, low_res_px=8, crop_px=8, unet=CONVOLUTION, sampler=ddim))
    for network in (prior, decoder, upsampler):
        randomise(network)
    for network in (prior, decoder):
        network.null_text.set(make_text((2,)))
    return Cascade(clip or Pictures(), [PriorStage.of(prior), DecoderStage.of(decoder), UpsamplerStage.of(upsampler)])


@pytest.fixture(scope="module")
def editor() -> Editor:
    return Editor(make_cascade(), SETTINGS)


@pytest.fixture(scope="module")
def latents(editor: Editor) -> Latents:
    return editor.encode(picture(0))


def difference(one: torch.Tensor, other: torch.Tensor) -> int:
    return int((one.int() - other.int()).abs().max())


def same(one: CascadeResult, other: CascadeResult) -> bool:
    """Equal to the rounding of a batched matrix product."""
    return all(difference(one.pictures[name], picture) <= 1 for name, picture in other.pictures.items())


def small(result: CascadeResult) -> torch.Tensor:
    """The decoder's pictures."""
    return result.pictures["decoder"]


def test_inversion_reconstructs_within_a_bound_and_refinements_tighten_it() -> None:
    source = to_uint8(resize_crop(to_pixels(picture(0)), 8)).float()
    errors = []
    for num_refinements in (0, 1, 4):
        editor = Editor(make_cascade(), replace(SETTINGS, num_refinements=num_refinements))
        again = editor.reconstruct(editor.encode(picture(0)), [0])
        errors.append((small(again).float() - source).pow(2).mean().sqrt().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1.0  # of 255 levels


def test_reconstruction_depends_on_both_latents(editor: Editor, latents: Latents) -> None:
    again, other = editor.reconstruct(latents, [0]), editor.encode(picture(1))
    assert not same(again, editor.reconstruct(replace(latents, z_image=other.z_image), [0]))
    assert not same(again, editor.reconstruct(replace(latents, x_T=other.x_T), [0]))


def test_guided_walk_is_inverted_with_its_guidance() -> None:
    editor = Editor(make_cascade(), replace(SETTINGS, latent_guidance=1.5))
    again = small(editor.reconstruct(editor.encode(picture(0)), [0]))
    assert difference(again, to_uint8(resize_crop(to_pixels(picture(0)), 8))) <= 3


def test_variation_without_noise_is_the_reconstruction(editor: Editor, latents: Latents) -> None:
    assert same(editor.vary(latents, [5], eta=0.0), editor.reconstruct(latents, [5]))


def test_variations_share_the_embedding_and_differ_by_seed_alone(editor: Editor, latents: Latents) -> None:
    three = editor.vary(latents, [5, 6, 7], eta=0.8)
    assert torch.equal(three.z_image, latents.z_image.expand(3, -1))
    assert difference(small(three)[0], small(three)[1]) > 5
    alone = editor.vary(latents, [6], eta=0.8)
    assert difference(alone.images[0], three.images[1]) <= 1


def test_noise_of_a_variation_is_its_own_and_not_that_of_its_start(editor: Editor, latents: Latents) -> None:
    decoder, x = editor.decoder.network, editor.noise([5])
    condition = decoder.encode_condition(latents.z_image, decoder.null_text.encoding(1))
    step = partial(ddim_step, noise=NoiseSource.from_seeds([5], "edit"), eta=0.8, limit=ClipRange())
    diffusion = Diffusion(decoder.config.diffusion)
    expected = sample_along(step, lambda x, t: decoder(x, t, condition), x, diffusion, editor.timesteps)
    actual = editor.run(editor.walk(eta=0.8), editor.frames(latents.z_image, x, [5]))
    assert difference(small(actual), to_uint8(expected)) <= 1


def test_ends_of_an_interpolation_are_the_reconstructions(editor: Editor, latents: Latents) -> None:
    other = editor.encode(picture(1))
    way = editor.interpolate(latents, other, [0.0, 0.5, 1.0], 3)
    for frame, end in ((0, latents), (2, other)):
        assert difference(way.images[frame : frame + 1], editor.reconstruct(end, [3]).images) <= 1
    torch.testing.assert_close(way.z_image.norm(dim=1), torch.ones(3))
    turned = way.z_image[1] @ torch.cat([latents.z_image, other.z_image]).T
    torch.testing.assert_close(turned[0], turned[1])


def test_interpolation_from_fixed_noise_samples_all_frames_from_the_seed(editor: Editor, latents: Latents) -> None:
    other = editor.encode(picture(1))
    way = editor.interpolate(latents, other, [0.0, 1.0], 3, noise="fixed")
    first = editor.run(editor.walk(), editor.frames(latents.z_image, editor.noise([3]), [3]))
    assert difference(way.images[:1], first.images) <= 1
    assert not same(first, editor.reconstruct(latents, [3]))


def test_text_diff_starts_at_the_reconstruction_and_turns_towards_the_difference(
    editor: Editor, latents: Latents
) -> None:
    turned = editor.text_diff(latents, "abc", "abcde", [0.0, 0.25, 1.0], 3)
    assert difference(turned.images[:1], editor.reconstruct(latents, [3]).images) <= 1
    source, target = Pictures().encode_text(["abc", "abcde"]).z_text
    cosine = turned.z_image @ F.normalize(target - source, dim=0)
    assert cosine[0] < cosine[1] < cosine[2]
    assert cosine[2].item() == pytest.approx(1, abs=1e-5)
    assert difference(turned.images[0], turned.images[2]) > 5


@pytest.mark.parametrize("inpainting", [False, True])
def test_inpainting_keeps_the_known_pixels_exactly(inpainting: bool) -> None:
    editor, image = Editor(make_cascade(inpainting=inpainting), SETTINGS), picture(0)
    result = editor.inpaint(image, right_half(image), "abcd", [1, 2])
    assert editor.inpaint_method == ("channels" if inpainting else "replacement")
    for frame in result.images:
        assert torch.equal(frame[:, :8], image[0, :, :8])
        assert difference(frame[:, 8:], image[0, :, 8:]) > 5
    smaller = to_uint8(resize_crop(to_pixels(image), 8))
    assert torch.equal(small(result)[:, :, :4], smaller[:, :, :4].expand(2, -1, -1, -1))
    assert difference(result.images[0], result.images[1]) > 5


@pytest.mark.parametrize("inpainting", [False, True])
def test_inpainted_part_depends_on_the_known_part(inpainting: bool) -> None:
    """Both methods let the network see what stays: another left half is another right half."""
    editor = Editor(make_cascade(inpainting=inpainting), SETTINGS)
    one, other = (
        small(editor.inpaint(picture(seed), right_half(picture(seed)), "abcd", [1]))[:, :, 4:] for seed in (0, 1)
    )
    assert difference(one, other) > 2


def test_inpainting_everything_by_replacement_is_sampling_the_prompt(editor: Editor) -> None:
    everything = torch.ones(picture(0).shape[:3], dtype=torch.bool)
    one, other = (editor.inpaint(picture(seed), everything, "abcd", [1]) for seed in (0, 1))
    assert same(one, other)


def test_a_mask_of_another_size_covers_every_pixel_that_it_touches() -> None:
    mask = torch.zeros(1, 32, 32, dtype=torch.bool)
    mask[0, 9, 20] = True
    smaller = resize_mask(mask, 8)
    assert smaller.nonzero().tolist() == [[0, 0, 2, 5]]
    assert resize_mask(smaller[:, 0], 16).sum() == 4


def test_sdedit_returns_the_picture_at_strength_0_and_forgets_it_at_1(editor: Editor) -> None:
    untouched = editor.sdedit(picture(0), "abcd", [1, 2], strength=0.0)
    assert torch.equal(untouched.images, picture(0).expand(2, -1, -1, -1))
    whole = [editor.sdedit(picture(seed), "abcd", [1], strength=1.0) for seed in (0, 1)]
    assert difference(small(whole[0]), small(whole[1])) <= 2  # 6e-5 of the picture is left in x_T
    source = to_uint8(resize_crop(to_pixels(picture(0)), 8)).float()
    distances = [
        (small(editor.sdedit(picture(0), "abcd", [1], strength=s)) - source).abs().mean() for s in (0.1, 0.4, 1.0)
    ]
    assert distances == sorted(distances)
    assert distances[0] < 4  # one step, from the noise of t = 0


def test_prompts_are_sampled_with_their_own_guidance() -> None:
    stages = [
        Editor(make_cascade(), replace(SETTINGS, prompt_guidance=scale)).sdedit(picture(0), "abcd", [1], strength=0.5)
        for scale in (None, 1.5, 4.0)
    ]
    assert same(stages[0], stages[1])  # the decoder's own
    assert not same(stages[0], stages[2])


def test_frames_do_not_depend_on_how_many_are_made_at_a_time(editor: Editor) -> None:
    cascade, seeds = make_cascade(), (5, 6, 7)
    few = Editor(Cascade(cascade.clip, cascade.stages, micro_batch=2), SETTINGS)
    mask = right_half(picture(0))
    assert same(few.inpaint(picture(0), mask, "abcd", seeds), editor.inpaint(picture(0), mask, "abcd", seeds))
    text, z_image = Captions().encode_text(["ab", "abcd", "abcdef"]), torch.cat([picture(i) for i in range(3)])
    batch = Batch(text, seeds, {Z_IMAGE: editor.embed(z_image), X_T: editor.noise(seeds)})
    assert same(few.run(few.walk(eta=0.8), batch), editor.run(editor.walk(eta=0.8), batch))


def test_editor_reports_every_step() -> None:
    steps: list[StageStep] = []
    editor = Editor(make_cascade(), SETTINGS, steps.append)
    editor.encode(picture(0))
    editor.inpaint(picture(0), right_half(picture(0)), "abcd", [1])
    walked = len(steps)
    editor.sdedit(picture(0), "abcd", [1], strength=0.4)
    assert [step.total for step in steps[walked:] if step.stage == "decoder"] == [5] * 5  # 0.4 of 12, rounded
    del steps[walked:]
    assert [(step.stage, step.done, step.total) for step in steps] == [
        *(("inversion", done, 12) for done in range(1, 13)),
        *(("prior", done, 2) for done in (1, 2)),
        *(("decoder", done, 12) for done in range(1, 13)),
        *(("upsampler_1", done, 2) for done in (1, 2)),
    ]
    assert steps[-1].x0.shape == (1, 3, 16, 16)


def test_what_cannot_be_edited_is_refused_in_words(editor: Editor, latents: Latents) -> None:
    with pytest.raises(EditError, match="no image tower"):
        Editor(make_cascade(clip=Captions()))
    with pytest.raises(EditError, match="1001 steps"):
        Editor(make_cascade(), EditSettings(num_steps=1001))
    with pytest.raises(EditError, match="no direction"):
        editor.text_diff(latents, "abc", "abc", [0.1], 0)
    with pytest.raises(EditError, match="opposite"):
        slerp(latents.z_image, -latents.z_image, [0.5])


def test_slerp_keeps_to_the_sphere_at_even_angles() -> None:
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    way = slerp(a, b, [0, 1 / 3, 0.5, 1])
    torch.testing.assert_close(way.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(way[1], torch.tensor([3**0.5 / 2, 0.5]))
    torch.testing.assert_close(slerp(a, a, [0.3]), a)


# Guidance by CLIP: of the edits that sample a prompt, and of no other.

PROMPT, SEEDS = "ab", [3, 4]
PICTURE = torch.randint(0, 256, (1, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def make_guided(clip_guidance_scale: float, *, inpainting: bool = False, tower: bool = True) -> Editor:
    torch.manual_seed(0)
    sampler = SamplerConfig(num_steps=4, guidance_scale=1.5, clip_guidance_scale=clip_guidance_scale)
    prior = Prior(PriorConfig(width=16, depth=1, num_heads=2, sampler=SamplerConfig(num_steps=2, clip_x0=False)), DIMS)
    decoder = Decoder(
        DecoderConfig(image_px=8, context_width=6, unet=UNET, inpainting=inpainting, sampler=sampler), DIMS
    )
    noisy_clip = NoisyClip(NoisyClipConfig(image_px=8, tower=CONVOLUTION), DIMS)
    for network in (prior, decoder, noisy_clip):
        randomise(network)
        network.requires_grad_(requires_grad=False)
    stages = [PriorStage.of(prior), DecoderStage.of(decoder, noisy_clip if tower else None)]
    return Editor(Cascade(Pictures(), stages), EditSettings(num_steps=8))


def similarity(editor: Editor, result: CascadeResult) -> torch.Tensor:
    """How near the pictures are to the prompt, as the noise-aware CLIP sees them."""
    pixels, noisy_clip = to_pixels(result.images), editor.decoder.noisy_clip
    assert noisy_clip is not None
    return noisy_clip(pixels, torch.zeros(len(pixels), dtype=torch.int64)) @ Pictures().encode_text([PROMPT]).z_text[0]


@pytest.mark.parametrize("inpainting", [False, True])
@pytest.mark.parametrize(
    "edit",
    [
        lambda editor: editor.sdedit(PICTURE, PROMPT, SEEDS, strength=0.9),
        lambda editor: editor.inpaint(PICTURE, right_half(PICTURE), PROMPT, SEEDS),
    ],
)
def test_edits_that_sample_a_prompt_are_guided_towards_it(
    edit: Callable[[Editor], CascadeResult], inpainting: bool
) -> None:
    plain, guided = (make_guided(scale, inpainting=inpainting) for scale in (0.0, 100.0))
    before, after = similarity(plain, edit(plain)), similarity(guided, edit(guided))
    assert (after > before + 0.01).all()


def test_inpainting_that_is_guided_keeps_what_is_known() -> None:
    frames = make_guided(100.0).inpaint(PICTURE, right_half(PICTURE), PROMPT, SEEDS).images
    assert torch.equal(frames[:, :, :4], PICTURE[:, :, :4].expand(2, -1, -1, -1))


@pytest.mark.parametrize(
    "edit",
    [
        lambda editor, latents: editor.reconstruct(latents, [0]),
        lambda editor, latents: editor.vary(latents, SEEDS, eta=0.8),
        lambda editor, latents: editor.interpolate(latents, latents, [0.0, 1.0], 0),
        lambda editor, latents: editor.text_diff(latents, "red", "a circle", [0.0, 0.4], 0),
        lambda editor, latents: editor.sample_embeddings(latents.z_image, 0),
    ],
)
def test_edits_without_a_prompt_are_not_guided(edit: Callable[[Editor, Latents], CascadeResult]) -> None:
    plain, guided = (edit(editor, editor.encode(PICTURE)) for editor in (make_guided(0.0), make_guided(100.0)))
    assert torch.equal(plain.images, guided.images)


def test_guidance_without_a_noise_aware_clip_is_refused() -> None:
    with pytest.raises(ValueError, match="no noise-aware CLIP"):
        make_guided(100.0, tower=False).sdedit(PICTURE, PROMPT, SEEDS, strength=0.5)
