"""Any of open_clip's models: the preprocessing, tokenizer and activation that its weights were trained with."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pipeline.clip.files import load_clip, load_inputs, load_pretrained, save_clip
from pipeline.clip.frozen import FrozenClip
from pipeline.clip.library import open_clip
from pipeline.clip.model import OpenClip, create_clip, describe_clip, wrap_clip
from pipeline.errors import ConfigError
from pipeline.pictures.frame import Framing
from tests.tiny.command import ROOT
from tests.tiny.networks import CLIP

_SIZES = [(48, 48), (64, 40), (31, 97), (24, 24), (20, 33), (200, 9)]


def _picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", _SIZES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_framing_gives_the_bytes_of_open_clips_own_preprocessing(
    mode: Any, interpolation: Any, size: tuple[int, int]
) -> None:
    config = open_clip.transform.PreprocessCfg(size=32, resize_mode=mode, interpolation=interpolation, fill_color=7)
    transform: Any = open_clip.transform.image_transform_v2(config, is_train=False)
    expected = _picture(*size)
    for step in transform.transforms[:-2]:  # without the conversion to a tensor and the standardisation
        expected = step(expected)
    framed = Framing(32, mode, interpolation, fill_level=7)(_picture(*size))
    assert np.array_equal(framed, np.array(expected))


def test_a_strip_is_framed_in_little_memory() -> None:
    framed = Framing(224)(Image.new("RGB", (1, 60_000), "red"))
    assert framed.shape == (224, 224, 3)
    assert (framed == (255, 0, 0)).all()


def _squashed(folder: Path) -> OpenClip:
    """A tiny CLIP with another preprocessing than OpenAI's, saved."""
    torch.manual_seed(0)
    preprocess = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "resize_mode": "squash", "interpolation": "bilinear"}
    clip = wrap_clip(create_clip(CLIP).model, CLIP.to_open_clip(), preprocess)
    save_clip(clip, folder)
    return clip


def test_a_saved_clip_keeps_its_own_preprocessing_and_open_clip_reads_it(tmp_path: Path) -> None:
    clip = _squashed(tmp_path)
    picture = _picture(60, 40)
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    theirs = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    with torch.no_grad():
        expected = theirs.encode_image(transform(picture)[None], normalize=True)
    for ours in (clip, load_clip(tmp_path)):
        z_image = FrozenClip(ours).encode_image(torch.from_numpy(np.array(picture))[None])
        torch.testing.assert_close(z_image, expected, rtol=0, atol=1e-5)
    assert load_inputs(tmp_path).framing == Framing(32, "squash", "bilinear")


def test_load_pretrained_keeps_the_preprocessing_of_a_folder(tmp_path: Path) -> None:
    _squashed(tmp_path)
    loaded = load_pretrained(f"local-dir:{tmp_path}")
    assert loaded.inputs.framing == Framing(32, "squash", "bilinear")
    assert loaded.mean == (0.5,) * 3


def _wrong_pairs() -> list[tuple[str, str]]:
    pairs = [(name, tag) for name, tag in open_clip.list_pretrained() if not name.endswith("-quickgelu")]
    weights = [(name, tag, open_clip.get_pretrained_cfg(name, tag)) for name, tag in pairs]
    configs = {name: open_clip.get_model_config(name) for name, _ in pairs}
    return [(n, tag) for n, tag, w in weights if w.get("quick_gelu") and not configs[n].get("quick_gelu")]


def test_weights_of_quickgelu_are_refused_by_the_name_that_is_right() -> None:
    pairs = _wrong_pairs()
    assert len(pairs) == 27
    assert ("ViT-L-14", "openai") in pairs
    for name, tag in pairs:
        with pytest.raises(ValueError, match="QuickGELU") as caught:
            load_pretrained(name, tag)
        right = f"{name}-quickgelu"
        assert str(caught.value).endswith(f'set clip.name = "{right}"')
        assert open_clip.get_model_config(right)["quick_gelu"]
        assert tag in open_clip.list_pretrained_tags_by_model(right)


_SMALL = {
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
_TOWERS: dict[str, dict[str, Any]] = {
    "both ways (MobileCLIP)": {"custom_text": True, "text_cfg": {"no_causal_mask": True}},
    "SigLIP": {
        "custom_text": True,
        "init_logit_bias": -10,
        "text_cfg": {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    },
    "CoCa": {
        "custom_text": True,
        "text_cfg": {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
    "quickgelu": {"quick_gelu": True},
}


@pytest.mark.parametrize("name", _TOWERS)
def test_every_kind_of_text_tower_embeds_as_open_clip_does(name: str, tmp_path: Path) -> None:
    changes = _TOWERS[name]
    config = {"embed_dim": 16, **changes, **{key: _SMALL[key] | changes.get(key, {}) for key in _SMALL}}
    model_config = json.loads(json.dumps(config))
    (tmp_path / "tiny-tower.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    open_clip.add_model_config(tmp_path)
    theirs = open_clip.create_model("tiny-tower").eval()
    save_clip(wrap_clip(theirs, model_config), tmp_path / "saved")
    ours = FrozenClip(load_clip(tmp_path / "saved"))
    captions = ["a red circle", "", "a large blue star above a small green square"]
    with torch.no_grad():
        expected = F.normalize(theirs.encode_text(ours.clip.tokenize(captions)), dim=-1)
    torch.testing.assert_close(ours.embed_text(captions), expected, rtol=0, atol=1e-6)
    if name == "quickgelu":
        torch.testing.assert_close(ours.encode_text(captions).z_text, expected, rtol=0, atol=1e-6)
    else:
        with pytest.raises(ConfigError, match="it can embed and search, not train or sample"):
            ours.encode_text(captions)


_LOADED_LATE = """
import sys
import torch
from pipeline.clip.model import describe_clip

late = {"timm", "torch._dynamo", "wandb"}
assert not late & set(sys.modules), late & set(sys.modules)
assert describe_clip("MobileCLIP2-S0").model.visual.trunk.num_features
assert "timm" in sys.modules
assert torch._dynamo.utils.is_compile_supported("cpu")
"""


def test_what_few_clips_need_is_imported_when_it_is_needed() -> None:
    done = subprocess.run([sys.executable, "-c", _LOADED_LATE], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_hugging_face_tokenizer_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    clip = describe_clip("ViT-B-16-SigLIP")
    with pytest.raises(ConfigError, match=r"^clip: the tokenizer timm/ViT-B-16-SigLIP .*$"):
        clip.tokenize(["a caption"])


def test_a_hugging_face_tokenizer_is_read_from_the_clips_folder_without_a_network(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers", reason="an extra: unclip[hf]")
    tokenizers: Any = pytest.importorskip("tokenizers", reason="an extra: unclip[hf]")
    words = {word: place for place, word in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "circle"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    model_config = {"embed_dim": 16, **json.loads(json.dumps(_SMALL)), "custom_text": True}
    model_config["text_cfg"] |= {"no_causal_mask": True, "pool_type": "last", "hf_tokenizer_name": "nobody/nothing"}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(str(tmp_path / "first"))
    (tmp_path / "tiny-hf.json").write_text(json.dumps(model_config))
    open_clip.add_model_config(tmp_path)
    model = open_clip.create_model("tiny-hf")
    (tmp_path / "first/open_clip_config.json").write_text(json.dumps({"model_cfg": model_config}))
    save_clip(wrap_clip(model, model_config, source=f"local-dir:{tmp_path / 'first'}"), tmp_path / "second")
    clip = FrozenClip(load_clip(tmp_path / "second"))
    tokens = clip.clip.tokenize(["a red circle", "a purple circle"])
    assert tokens[:, :5].tolist() == [[3, 4, 5, 1, 0], [3, 2, 5, 1, 0]]
    assert clip.embed_text(["a red circle"]).shape == (1, 16)
    length = clip.clip.inputs.context_length
    assert clip.clip.inputs.num_whole_words("a red circle") == 3
    assert clip.clip.inputs.num_whole_words("red " * length) == length - 2


def test_a_caption_without_spaces_is_tokenised_at_once() -> None:
    clip = create_clip(CLIP)
    tokens = clip.tokenize(["red circle " + "x" * 3_000_000, "red circle " + "x" * 1000])
    assert torch.equal(tokens[0], tokens[1])
