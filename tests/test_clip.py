"""CLIP: our reading of open_clip's models against open_clip itself."""

import json
import math
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from models.sample_random import SampleRandom
from pipeline.clip.files import draw_as_loading, load_clip, load_pretrained, save_clip
from pipeline.clip.frozen import FrozenClip
from pipeline.clip.inputs import count_tokens, inputs_of
from pipeline.clip.library import open_clip
from pipeline.clip.model import OpenClip, create_clip
from pipeline.data.batch import Batch
from pipeline.networks.clip import CLIP as CLIP_KIND
from pipeline.networks.clip import ClipObjective
from pipeline.networks.contrast import Pairs, contrastive_loss
from pipeline.pictures.frame import Framing
from pipeline.train.memory import LiveBytes
from tests.tiny.command import ROOT
from tests.tiny.networks import CLIP

CONFIG = replace(CLIP, text_layers=2, context_length=20)
CAPTIONS = ["a red circle", "a small blue star on a white background", ""]


@pytest.fixture(scope="module")
def frozen() -> FrozenClip:
    torch.manual_seed(0)
    return FrozenClip(create_clip(CONFIG))


def test_encode_text_equals_open_clip(frozen: FrozenClip) -> None:
    ours = frozen.encode_text(CAPTIONS)
    theirs = frozen.model.encode_text(frozen.clip.tokenize(CAPTIONS), normalize=True)
    torch.testing.assert_close(ours.z_text, theirs, rtol=0, atol=1e-6)


def test_a_clip_in_half_precision_says_the_same_to_two_decimals() -> None:
    """Bounds: cosines of embeddings above .999, states of tokens within 3 % of their norm; all leaves in float32."""
    torch.manual_seed(0)
    whole = FrozenClip(create_clip(CONFIG))
    half = deepcopy(whole).to(torch.bfloat16)
    images = torch.randint(0, 255, (4, 32, 32, 3), dtype=torch.uint8)
    pairs = [
        (whole.encode_image(images), half.encode_image(images)),
        (whole.encode_text(CAPTIONS).z_text, half.encode_text(CAPTIONS).z_text),
    ]
    for ours, rounded in pairs:
        assert rounded.dtype == torch.float32
        assert not torch.equal(ours, rounded)
        assert (ours * rounded).sum(1).min() > 0.999
    states, rounded_states = whole.encode_text(CAPTIONS).hidden, half.encode_text(CAPTIONS).hidden
    assert rounded_states.dtype == torch.float32
    assert ((states - rounded_states).norm(dim=-1) / states.norm(dim=-1)).max() < 0.03
    torch.testing.assert_close(half.embed_text(CAPTIONS), half.encode_text(CAPTIONS).z_text)


def test_encode_text_masks_up_to_the_end_token_and_cuts_the_rest(frozen: FrozenClip) -> None:
    encoding = frozen.encode_text(CAPTIONS)
    assert encoding.mask.sum(1).tolist() == [5, 10, 2]
    assert encoding.hidden.shape == (3, 16, 16)
    assert not encoding.mask[2, 2:].any()


def test_encode_text_keeps_the_end_of_a_caption_that_is_cut(frozen: FrozenClip) -> None:
    encoding = frozen.encode_text(["red " * 50])
    assert encoding.mask.sum() == CONFIG.context_length


def test_encode_text_does_not_depend_on_the_batch(frozen: FrozenClip) -> None:
    together, alone = frozen.encode_text(CAPTIONS), frozen.encode_text(CAPTIONS[:1])
    torch.testing.assert_close(together.z_text[:1], alone.z_text, rtol=0, atol=1e-6)
    torch.testing.assert_close(together.hidden[:1, :5], alone.hidden[:, :5], rtol=0, atol=1e-5)


def test_hidden_are_the_token_states_after_the_final_norm(frozen: FrozenClip) -> None:
    encoding = frozen.encode_text(CAPTIONS)
    end = encoding.mask.sum(1) - 1
    pooled = encoding.hidden[torch.arange(3), end] @ frozen.model.text_projection
    torch.testing.assert_close(torch.nn.functional.normalize(pooled, dim=-1), encoding.z_text)


def test_encode_image_equals_open_clip_preprocessing_and_model(frozen: FrozenClip) -> None:
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(1, 3, 1, 1)
    prepared = (images.permute(0, 3, 1, 2) / 255 - mean) / std
    theirs = frozen.model.encode_image(prepared, normalize=True)
    torch.testing.assert_close(frozen.encode_image(images), theirs, rtol=0, atol=1e-5)


def test_encode_image_takes_pictures_of_any_size_as_open_clip_crops_them(frozen: FrozenClip) -> None:
    images = torch.randint(0, 256, (2, 48, 40, 3), dtype=torch.uint8)
    squares = torch.from_numpy(np.stack([Framing(32)(Image.fromarray(image.numpy())) for image in images]))
    embedding = frozen.encode_image(images)
    assert torch.equal(embedding, frozen.encode_image(squares))
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(2))
    # A network's pixels are resized without rounding, so that gradients pass.
    pixels = squares.permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(embedding, frozen.encode_image(pixels), rtol=0, atol=1e-5)


def test_frozen_clip_stays_in_evaluation_mode_without_gradients(frozen: FrozenClip) -> None:
    frozen.train()
    assert not any(module.training for module in frozen.model.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def clip_loss(
    clip: OpenClip, images: torch.Tensor, tokens: torch.Tensor, *, negatives: torch.Tensor | None = None
) -> torch.Tensor:
    image, text, scale, *_ = clip.model(clip.prepare(images), tokens)
    negative = None if negatives is None else clip.model.encode_text(negatives, normalize=True)
    return contrastive_loss(Pairs(image, text, scale, negative))


def _loss_of(objective: ClipObjective, batch: Batch) -> float:
    """The loss of one worker's step, or of a validation."""
    random = SampleRandom.of_samples(1, range(len(batch)))
    return float(objective(objective.prepare(batch, random) if objective.training else batch, random).detach())


def test_clip_loss_of_half_precision_features_is_taken_in_full_precision() -> None:
    clip = create_clip(CONFIG)
    clip.model.logit_scale.data.fill_(4.6)
    images, tokens = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)), clip.tokenize(CAPTIONS[:3])
    with torch.autocast("cpu", torch.bfloat16):
        image, text, scale, *_ = clip.model(clip.prepare(images), tokens)
        loss = clip_loss(clip, images, tokens)
    logits, own = scale * image.float() @ text.float().T, torch.arange(3)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_hard_negatives_add_the_loss_of_telling_each_caption_from_its_own() -> None:
    clip = create_clip(CONFIG)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens, negatives = clip.tokenize(CAPTIONS[:3]), clip.tokenize([*CAPTIONS[1:3], CAPTIONS[2]])
    image, text, scale, *_ = clip.model(clip.prepare(images), tokens)
    other = clip.model.encode_text(negatives, normalize=True)
    added = clip_loss(clip, images, tokens, negatives=negatives) - clip_loss(clip, images, tokens)
    pairs = [torch.stack([image[i] @ text[i], image[i] @ other[i]]) * scale for i in range(3)]
    expected = torch.stack([F.cross_entropy(pair, torch.tensor(0)) for pair in pairs]).mean()
    torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-5)
    same = clip_loss(clip, images, tokens, negatives=tokens)
    plain = clip_loss(clip, images, tokens)
    clip.model.zero_grad()
    (same - plain).backward()  # a caption without a negative stands for itself: a constant, without a gradient
    gradients = [p.grad.abs().max().item() for p in clip.model.parameters() if p.grad is not None]
    assert max(gradients) < 1e-4
    assert (same - plain).item() == pytest.approx(math.log(2), rel=1e-3)


def test_objective_takes_hard_negatives_in_training_alone_and_repeats_them_by_seed() -> None:
    captions = ("a red star on a blue field", "a blue star on a red field", "a red field")
    batch = Batch(captions, captions, torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8))
    losses: dict[bool, list[float]] = {}
    for hard_negatives in (False, True):
        torch.manual_seed(0)
        network = CLIP_KIND.create(replace(CONFIG, hard_negatives=hard_negatives), CONFIG.dims())
        objective = ClipObjective(network)
        losses[hard_negatives] = [_loss_of(objective.train(training), batch) for training in (True, True, False)]
    assert losses[True][0] > losses[False][0] + 0.1
    assert losses[True][0] == losses[True][1]
    assert losses[True][2] == losses[False][2]


def test_hard_negatives_of_training_swap_only_what_is_read() -> None:
    head, tail = " ".join(f"word{number}" for number in range(CONFIG.context_length)), "a cat and a dog"
    captions = (f"{head} {tail}", tail, "a dog and a cat")
    objective = ClipObjective(CLIP_KIND.create(replace(CONFIG, hard_negatives=True), CONFIG.dims()))
    batch = objective.prepare(Batch(captions, captions), SampleRandom.of_samples(1, range(3)))
    assert batch.negatives == (captions[0], "a dog and a cat", "a cat and a dog")


def test_open_clip_is_loaded_without_wandb_which_others_may_still_load() -> None:
    code = "import sys, pipeline.clip.library; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_clip_loss_falls_when_trained() -> None:
    torch.manual_seed(0)
    clip = create_clip(CONFIG)
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    tokens = clip.tokenize([f"picture number {i}" for i in range(8)])
    optimizer = torch.optim.Adam(clip.model.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss = clip_loss(clip, images, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_save_and_load_give_the_same_embeddings_and_bytes(frozen: FrozenClip, tmp_path: Path) -> None:
    save_clip(frozen.clip, tmp_path / "a")
    loaded = load_clip(tmp_path / "a")
    save_clip(loaded, tmp_path / "b")
    assert torch.equal(FrozenClip(loaded).encode_text(CAPTIONS).hidden, frozen.encode_text(CAPTIONS).hidden)
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


class _OnTheCpu(LiveBytes):
    """Counts the tensors that have data."""

    def _note(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == "cpu":
            super()._note(tensor)


@pytest.mark.parametrize("vision", ["vit", "resnet"])
def test_what_loading_draws_is_drawn_again_in_the_memory_of_one_tensor(
    vision: Literal["vit", "resnet"], tmp_path: Path
) -> None:
    clip = create_clip(replace(CONFIG, vision=vision, vision_width=64, patch_px=8))
    save_clip(clip, tmp_path)
    largest = max(parameter.nbytes for parameter in clip.model.parameters())
    torch.manual_seed(1)
    load_clip(tmp_path)
    expected = torch.randn(20)
    torch.manual_seed(1)
    with _OnTheCpu([]) as live:
        draw_as_loading(tmp_path)
    assert torch.equal(torch.randn(20), expected)
    assert largest <= live.peak < 1.1 * largest


def test_saved_folder_is_read_by_open_clip_itself(frozen: FrozenClip, tmp_path: Path) -> None:
    save_clip(frozen.clip, tmp_path)
    loaded = load_pretrained(f"local-dir:{tmp_path}")
    assert loaded.dims == CONFIG.dims()
    assert torch.equal(FrozenClip(loaded).encode_text(CAPTIONS).z_text, frozen.encode_text(CAPTIONS).z_text)


def test_load_clip_names_the_folder_when_a_file_is_missing(frozen: FrozenClip, tmp_path: Path) -> None:
    save_clip(frozen.clip, tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"is not an open_clip folder .*open_clip_model.safetensors"):
        load_clip(tmp_path)


def test_load_clip_names_the_folder_when_the_weights_are_cut_short(frozen: FrozenClip, tmp_path: Path) -> None:
    save_clip(frozen.clip, tmp_path)
    weights = tmp_path / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"{tmp_path.name} is not an open_clip folder.*SafetensorError"):
        load_clip(tmp_path)


def test_load_clip_refuses_weights_of_another_shape(frozen: FrozenClip, tmp_path: Path) -> None:
    save_clip(frozen.clip, tmp_path)
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["width"] = 32
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="size mismatch"):
        load_clip(tmp_path)


def test_load_pretrained_says_what_could_not_be_loaded() -> None:
    with pytest.raises(ValueError, match="CLIP 'ViT-Nowhere' could not be loaded"):
        load_pretrained("ViT-Nowhere")


def test_open_clip_config_builds_the_same_model_in_open_clip(tmp_path: Path) -> None:
    (tmp_path / "tiny-ours.json").write_text(json.dumps(CONFIG.to_open_clip()))
    open_clip.add_model_config(tmp_path)
    theirs = open_clip.create_model("tiny-ours", pretrained=None)
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {
        k: v.shape for k, v in create_clip(CONFIG).model.state_dict().items()
    }


def test_create_clip_builds_the_vit_that_the_configuration_describes(tmp_path: Path) -> None:
    config = replace(CONFIG, vision="vit", image_px=24, patch_px=8, vision_width=16, vision_depth=3, vision_heads=4)
    clip = create_clip(config)
    assert len(clip.model.visual.transformer.resblocks) == 3
    assert clip.model.visual.conv1.weight.shape == (16, 3, 8, 8)
    assert clip.model.visual.transformer.resblocks[0].attn.num_heads == 4
    save_clip(clip, tmp_path)
    images = torch.randint(0, 256, (2, 24, 24, 3), dtype=torch.uint8)
    again = FrozenClip(load_clip(tmp_path)).encode_image(images)
    torch.testing.assert_close(again, FrozenClip(clip).encode_image(images))
    assert again.shape == (2, config.embed_dim)


class Words:
    """Stands for a tokenizer of Hugging Face: a token a word, an end token or none, and any token as padding."""

    def __init__(self, padding: int, end: tuple[int, ...]) -> None:
        self._padding, self._end = padding, end

    def __call__(self, captions: list[str], context_length: int) -> torch.Tensor:
        tokens = [[1, *(2 + len(word) for word in caption.split())] for caption in captions]
        rows = [[*row[: context_length - len(self._end)], *self._end] for row in tokens]
        return torch.tensor([row + [self._padding] * (context_length - len(row)) for row in rows])


@pytest.mark.parametrize(("padding", "end"), [(2, (2,)), (0, (2,)), (0, ())])
def test_whatever_the_tokenizer_a_caption_is_cut_only_if_it_has_more_tokens_than_are_read(
    padding: int, end: tuple[int, ...]
) -> None:
    inputs = inputs_of({"text_cfg": {"context_length": 8}}, {"size": 32}, "")
    vars(inputs)["tokenizer"] = Words(padding, end)
    captions = [" ".join(["cat"] * number) for number in range(12)]
    most = 8 - 1 - len(end)
    assert inputs.cut_at(captions) == [8 if number > most else 0 for number in range(12)]
    assert inputs.cut_at([]) == []


def test_clips_own_tokenizer_cuts_what_it_counts_as_longer() -> None:
    captions = [" ".join(["cat", "zyzzyva", "dog"] * 20)[:length] for length in range(0, 200, 3)]
    inputs = inputs_of({"text_cfg": {"context_length": 20}}, {"size": 32}, "")
    assert inputs.cut_at(captions) == [20 if tokens > 20 else 0 for tokens in count_tokens(captions)]
    assert set(inputs.cut_at(captions)) == {0, 20}


def test_whole_words_are_those_of_the_longest_beginning_that_is_not_cut() -> None:
    inputs = inputs_of({"text_cfg": {"context_length": 20}}, {"size": 32}, "")
    for caption in (" ".join(["cat", "zyzzyva", "don't", "dog,"] * number) for number in range(8)):
        words = caption.split()
        whole = [n for n in range(len(words) + 1) if inputs.cut_at([" ".join(words[:n])]) == [0]]
        assert inputs.num_whole_words(caption) == max(whole)
    assert inputs.num_whole_words("cat " + "x" * 100_000) == 1  # at once: its tokens are not counted


def test_words_of_a_hugging_face_tokenizer_are_counted_by_its_own_tokens() -> None:
    inputs = inputs_of({"text_cfg": {"context_length": 10}}, {"size": 32}, "")
    asked: list[str] = []

    def encode(word: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        asked.append(word)
        return [1] * len(word)  # a token for each letter, and two at most of start and end

    vars(inputs)["tokenizer"] = SimpleNamespace(tokenizer=SimpleNamespace(encode=encode))
    assert [inputs.num_whole_words(text) for text in ("", "a cat", "cat cat ab", "cat cat abc", "a " * 20)] == [
        0, 2, 3, 2, 8,
    ]  # fmt: skip
    assert sorted(asked) == ["a", "ab", "abc", "cat"]  # each word once
