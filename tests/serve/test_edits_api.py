"""Requests that start from pictures, by OpenAI's own client and by forms."""

import base64
import inspect
import io
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image

from models.cascade import Cascade
from models.editor import Editor, EditSettings
from models.request import SampleRequest, StartPicture, Variation
from models.stage import Z_IMAGE
from pipeline.recipe.picture_card import ModelCard
from pipeline.recipe.provenance import Signer
from pipeline.serve.api import ApiSettings, create_app
from pipeline.serve.edits import EDITS
from tests.serve.asking import run_phases
from tests.serve.edit_requests import STEPS, images, png_of, post
from tests.tiny.pictures import almost_equal, noisy_picture, png, raw, tensor
from tests.tiny.shards import pixels, plain_picture

PROMPT = "a large red circle on a white background"


def right_half(side_px: int = 32, *, alpha: bool = True) -> bytes:
    """A mask of the right half: transparent there, or white there."""
    masked = np.zeros((side_px, side_px), np.uint8)
    masked[:, side_px // 2 :] = 255
    return png(np.stack([masked] * 3 + [255 - masked], axis=2) if alpha else masked)


def test_openais_client_inpaints_where_the_mask_is_transparent(server: Any, client: openai.OpenAI) -> None:
    picture = noisy_picture(1)
    answer = client.images.edit(
        image=("p.png", picture), mask=("m.png", right_half()), prompt=PROMPT, n=2, size="32x32", model="tiny",
        response_format="b64_json", user="me", input_fidelity="high", extra_body={"seed": 5, **STEPS},
    )  # fmt: skip
    for image in images(answer):
        np.testing.assert_array_equal(image[:, :16], pixels(picture)[:, :16])
        assert np.abs(image[:, 16:].astype(int) - pixels(picture)[:, 16:]).mean() > 5
    first, second = images(answer)
    assert not almost_equal(first, second)
    assert answer.model_extra is not None
    assert answer.safety_identifier == "me"
    [note] = answer.model_extra["notes"]
    assert note.startswith("input_fidelity: has no effect with a mask")
    assert [image.model_extra for image in answer.data or []] == [{"seed": 5}, {"seed": 6}]


def test_opaque_masks_are_white_where_they_edit_and_a_pictures_own_alpha_is_a_mask(server: Any) -> None:
    picture = noisy_picture(1)
    cut = np.dstack([pixels(picture), 255 - np.array(Image.open(io.BytesIO(right_half(alpha=False))))])
    sources = [(picture, right_half()), (picture, right_half(alpha=False)), (png(cut), None)]
    answers = [images(post(server, "edits", one, mask=mask, prompt=PROMPT, seed="5"))[0] for one, mask in sources]
    np.testing.assert_array_equal(answers[0], answers[1])
    np.testing.assert_array_equal(answers[0][:, :16], answers[2][:, :16])


def test_an_edit_without_a_mask_starts_from_the_picture_and_says_so(server: Any, editor: Editor) -> None:
    picture = noisy_picture(1)
    answer = post(server, "edits", picture, prompt=PROMPT, seed="5", input_fidelity="high")
    assert answer.json()["notes"] == ["no mask: the whole picture is edited, with strength 0.4"]
    assert images(answer)[0].shape == (32, 32, 3)
    same = post(server, "sdedits", picture, prompt=PROMPT, seed="5", strength="0.4")
    np.testing.assert_array_equal(images(answer)[0], images(same)[0])
    request = SampleRequest(PROMPT, (5,), num_steps={"decoder": 3}, edit=StartPicture(raw(picture), 0.4))
    assert almost_equal(images(same)[0], run_phases(editor, request).images[0])


def test_edits_stream_as_openai_does(client: openai.OpenAI) -> None:
    stream = client.images.edit(
        image=("p.png", noisy_picture(1)), mask=("m.png", right_half()), prompt=PROMPT, stream=True, partial_images=2,
        extra_body={"num_inference_steps": 10},
    )  # fmt: skip
    events = list(stream)
    assert [event.type for event in events] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]  # type: ignore[union-attr]
    assert pixels(base64.b64decode(events[-1].b64_json)).shape == (32, 32, 3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # OpenAI's own models answer it no more
def test_openais_client_varies_a_picture(server: Any, client: openai.OpenAI, editor: Editor) -> None:
    picture = noisy_picture(1)
    answer = client.images.create_variation(
        image=("p.png", picture), n=2, response_format="b64_json", model="tiny", user="me", extra_body={"seed": 5}
    )
    varied = images(answer)
    assert not almost_equal(varied[0], varied[1])
    own = run_phases(editor, SampleRequest("", (5, 6), edit=Variation(raw(picture))))
    torch.testing.assert_close(own.z_image, editor.embed(tensor(picture)).expand(2, -1))
    assert all(almost_equal(one, other) for one, other in zip(varied, own.images, strict=True))


def test_a_variation_is_sampled_from_its_pictures_embedding(cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    editor, request = Editor(cascade), SampleRequest("", (5,), edit=Variation(raw(noisy_picture(1))))
    z_image, results = editor.embed(tensor(noisy_picture(1))), list[Any]()
    for sign in (1, 1, -1):  # this CLIP is not trained, and sees all pictures as much the same
        monkeypatch.setattr(editor, "embed", lambda _, sign=sign: sign * z_image)
        results.append(run_phases(editor, request))
    assert torch.equal(results[0].images, results[1].images)
    assert (results[0].images.int() - results[2].images.int()).abs().max() > 3
    torch.testing.assert_close(results[2].z_image, -z_image)


def test_variations_with_eta_are_those_of_the_command(server: Any, editor: Editor) -> None:
    picture = noisy_picture(1)
    answer = post(server, "variations", picture, eta="0.8", n="2", seed="5")
    expected = editor.vary(editor.encode(tensor(picture)), [5, 6], eta=0.8).images
    assert all(almost_equal(one, other) for one, other in zip(images(answer), expected, strict=True))
    [again] = images(post(server, "reconstructions", picture, seed="5"))
    assert almost_equal(again, editor.reconstruct(editor.encode(tensor(picture)), [5]).images[0])


@pytest.mark.parametrize("noise", ["slerp", "fixed"])
def test_interpolations_are_those_of_the_command(server: Any, editor: Editor, noise: Any) -> None:
    one, other = noisy_picture(1), noisy_picture(2, 48)
    answer = post(server, "interpolations", one, other, n="3", seed="5", noise=noise)
    latents = [editor.encode(tensor(data)) for data in (one, other)]
    expected = editor.interpolate(latents[0], latents[1], [0.0, 0.5, 1.0], 5, noise=noise).images
    assert all(almost_equal(frame, same) for frame, same in zip(images(answer), expected, strict=True))
    assert [(frame["seed"], frame["share"]) for frame in answer.json()["data"]] == [(5, 0.0), (5, 0.5), (5, 1.0)]


def test_text_diffs_are_those_of_the_command(server: Any, editor: Editor) -> None:
    picture, texts = noisy_picture(1), {"source": "a red circle", "target": "a blue square"}
    answer = post(server, "text-diffs", picture, n="2", seed="5", theta="0.5", guidance_scale="1.5", **texts)
    guided = Editor(server.cascade, EditSettings(num_steps=3, latent_guidance=1.5))
    latents = guided.encode(tensor(picture))
    expected = guided.text_diff(latents, texts["source"], texts["target"], [0.0, 0.5], 5).images
    assert all(almost_equal(frame, same) for frame, same in zip(images(answer), expected, strict=True))
    assert [frame["theta"] for frame in answer.json()["data"]] == [0.0, 0.5]
    upsampling = sum(stage.sampler.num_steps for stage in server.cascade.after(Z_IMAGE)[1:])
    assert answer.json()["usage"]["steps"] == 3 + 2 * (3 + upsampling)
    [alone] = images(post(server, "text-diffs", picture, n="1", seed="5", theta="0.5", guidance_scale="1.5", **texts))
    assert almost_equal(alone, images(answer)[1])


def test_a_size_ends_an_edit_at_the_stage_that_makes_it(server: Any) -> None:
    side = server.cascade.sides_px["decoder"]
    for route in ("variations", "reconstructions"):
        answer = post(server, route, noisy_picture(3), size=f"{side}x{side}")
        assert images(answer)[0].shape == (side, side, 3)
        steps = 3 * (2 if route == "reconstructions" else 1)
        assert answer.json()["usage"]["steps"] == steps


def test_png_says_which_file_was_edited_and_how(server: Any) -> None:
    answer = post(server, "sdedits", noisy_picture(1), prompt=PROMPT, strength="0.5", response_format="file")
    with Image.open(io.BytesIO(answer.content)) as picture:
        chunks: dict[str, str] = picture.text
    assert "Denoising strength: 0.5" in chunks["parameters"]
    edit = json.loads(chunks["unclip"])["edit"]
    assert (edit["kind"], edit["strength"]) == ("startpicture", 0.5)
    assert len(edit["sources"][0]) == 64
    walked = post(server, "variations", noisy_picture(1), eta="0.5", response_format="file")
    with Image.open(io.BytesIO(walked.content)) as picture:
        assert "Steps: 3, Sampler: ddim, CFG scale: 1.0" in picture.text["parameters"]


def test_png_of_a_picture_with_a_mask_says_that_a_part_is_somebodys_own(server: Any) -> None:
    kinds = list[str]()
    for mask in (right_half(), None):
        answer = post(server, "edits", noisy_picture(1), mask=mask, prompt=PROMPT, response_format="file")
        [action] = json.loads(png_of(answer.content).text["unclip"])["actions"]
        kinds.append(f"{action['action']} {action['digitalSourceType'].rpartition('/')[2]}")
    assert kinds == ["c2pa.edited compositeWithTrainedAlgorithmicMedia", "c2pa.created trainedAlgorithmicMedia"]


@pytest.mark.parametrize("route", ["edits", "sdedits"])
def test_no_strength_returns_the_picture_itself_as_the_command_does(server: Any, editor: Editor, route: str) -> None:
    picture = noisy_picture(1)
    answer = post(server, route, picture, prompt=PROMPT, strength="0", n="2")
    expected = editor.sdedit(tensor(picture), PROMPT, [5, 6], strength=0.0)
    assert all(np.array_equal(one, same) for one, same in zip(images(answer), expected.images, strict=True))
    assert answer.json()["usage"]["steps"] == 0
    side = server.cascade.sides_px["decoder"]
    [small] = images(post(server, route, picture, prompt=PROMPT, strength="0", size=f"{side}x{side}"))
    assert small.shape == (side, side, 3)
    assert server.engine.counts()["active"] == server.engine.counts()["waiting"] == 0


def test_no_strength_gives_a_file_that_names_no_model_and_is_not_signed(server: Any, serving: Any) -> None:
    card = ModelCard(
        "tiny", 32, {"decoder": "0" * 16}, {"decoder": "1" * 64}, signer=Signer(Ed25519PrivateKey.generate())
    )
    picture, sent = noisy_picture(1), {"prompt": PROMPT, "response_format": "file"} | STEPS
    with serving(create_app(server.engine, None, ApiSettings(card))) as url:
        files = [
            httpx.post(
                f"{url}/v1/images/sdedits", data=sent | {"strength": strength}, files={"image": picture}, timeout=60
            )
            for strength in ("0", "0.5")
        ]
    names = [set(png_of(file.content).text) for file in files]
    assert names == [set(), {"parameters", "unclip", "unclip-signature"}]
    assert "strength: with 0 the picture comes back as it is" in files[0].headers["X-Unclip-Notes"]
    np.testing.assert_array_equal(pixels(files[0].content), pixels(picture))


@pytest.mark.parametrize(
    ("route", "fields", "files", "param", "words"),
    [
        ("edits", {}, {"image": "1"}, "prompt", "required"),
        ("edits", {"prompt": PROMPT}, {}, "image", "one picture is edited, and 0 came"),
        ("edits", {"prompt": PROMPT}, {"image": "12"}, "image", "one picture is edited, and 2 came"),
        ("edits", {"prompt": PROMPT}, {"image": "1", "markup": "1"}, "markup", "unknown parameter"),
        ("edits", {"prompt": PROMPT, "frame_count": "3"}, {"image": "1"}, "frame_count", "unknown parameter"),
        ("edits", {"prompt": PROMPT, "svg[model]": "x"}, {"image": "1"}, "svg[model]", "unknown parameter"),
        ("edits", {"prompt": PROMPT, "n": "two"}, {"image": "1"}, "n", "n:"),
        ("edits", {"prompt": PROMPT, "output_format": "gif"}, {"image": "1"}, "output_format", "png"),
        ("edits", {"prompt": PROMPT, "background": "transparent"}, {"image": "1"}, "background", "opaque"),
        ("edits", {"prompt": PROMPT, "model": "other"}, {"image": "1"}, "model", "does not exist"),
        ("edits", {"prompt": PROMPT, "size": "64x64"}, {"image": "1"}, "size", "square"),
        ("edits", {"prompt": PROMPT}, {"image": "1", "mask": "1"}, "mask", "the mask is empty"),
        ("edits", {"prompt": PROMPT}, {"image": "1", "mask": "large"}, "mask", "different sizes"),
        ("variations", {}, {"image": "nonsense"}, "image", "not a picture"),
        ("variations", {}, {"image": "bomb"}, "image", "image area too large"),
        ("variations", {"eta": "2"}, {"image": "1"}, "eta", "eta"),
        ("variations", {"prompt": PROMPT}, {"image": "1"}, "prompt", "unknown parameter"),
        ("variations", {}, {"image": "1", "mask": "1"}, "mask", "unknown parameter"),
        ("interpolations", {}, {"image": "1"}, "image", "2 pictures are needed, and 1 came"),
        ("text-diffs", {"source": "a", "target": "a"}, {"image": "1"}, None, "the same"),
        ("pca-reconstructions", {"components": "3,x"}, {"image": "1"}, "components", "whole numbers"),
        ("pca-reconstructions", {"components": "0"}, {"image": "1"}, "components", "whole numbers"),
        ("pca-reconstructions", {"components": "1,1,1,1,1,1,1,1,1,1"}, {"image": "1"}, "components", "at most 9"),
        ("pca-reconstructions", {"components": "1" * 101}, {"image": "1"}, "components", "at most 100 characters"),
        ("pca-reconstructions", {"components": "17"}, {"image": "1"}, "components", "have 16 components"),
        ("pca-reconstructions", {"n": "2"}, {"image": "1"}, "n", "no meaning"),
        ("sdedits", {"prompt": PROMPT, "strength": "-0.1"}, {"image": "1"}, "strength", "strength"),
        ("sdedits", {"prompt": PROMPT, "num_inference_steps": "1001"}, {"image": "1"}, "num_inference_steps", "1000"),
    ],
)  # fmt: skip
def test_wrong_forms_are_refused_by_name(
    server: Any, route: str, fields: dict[str, str], files: dict[str, str], param: str | None, words: str
) -> None:
    special = {
        "nonsense": b"GIF89a",
        "bomb": plain_picture("red", 6400 if "bomb" in files.values() else 1),  # most of a second to make
        "large": right_half(64),
        "1": black(),
        "2": black(),
    }
    sent: list[Any] = [(name, (None, text)) for name, text in fields.items()]
    sent += [
        (name, ("file.png", special[kind]))
        for name, kinds in files.items()
        for kind in ([kinds] if kinds in special else kinds)
    ]
    answer = httpx.post(f"{server.url}/v1/images/{route}", files=sent, timeout=60)
    error = answer.json()["error"]
    assert answer.status_code == (404 if param == "model" else 400), error
    assert words in error["message"]
    assert error["param"] == param


def black() -> bytes:
    return png(np.zeros((32, 32, 3), np.uint8))


def test_bodies_that_are_no_form_or_too_large_are_refused(server: Any) -> None:
    url = f"{server.url}/v1/images/variations"
    for content, kind in (
        (b"{}", "application/json"),
        (b"x", "multipart/form-data"),
        (b"", "multipart/form-data; boundary=a"),
    ):
        answer = httpx.post(url, content=content, headers={"Content-Type": kind})
        assert answer.status_code == 400
    large = httpx.post(url, files={"image": b"x" * (25 << 20)}, timeout=60)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")


def test_a_picture_that_comes_as_text_is_refused_in_words(server: Any) -> None:
    form = [("image", (None, base64.b64encode(black()).decode())), ("prompt", (None, PROMPT))]
    error = httpx.post(f"{server.url}/v1/images/edits", files=form).json()["error"]
    assert (error["param"], error["message"]) == (
        "image",
        "image: came as text; send the file itself, with a file name",
    )


def test_texts_that_clip_reads_as_the_same_are_400_and_stop_nothing(server: Any) -> None:
    answer = post(server, "text-diffs", noisy_picture(1), source="a red circle", target="A RED circle")
    assert answer.status_code == 400
    assert "no direction" in answer.json()["error"]["message"]
    stream = post(server, "text-diffs", noisy_picture(1), source="a red circle", target="A RED circle", stream="true")
    [event] = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: ")]
    assert (event["error"]["type"], event["error"]["code"]) == ("invalid_request_error", "invalid_value")
    assert httpx.get(f"{server.url}/healthz").json()["status"] == "ok"


def test_the_page_about_http_names_every_field_of_every_route() -> None:
    page = (Path(__file__).parents[2] / "docs/http.md").read_text()
    for route, kind in EDITS.items():
        [row] = [line for line in page.splitlines() if line.startswith(f"| `POST /v1/images/{route}` |")]
        named = {part.strip("` ") for part in row.split("|")[3].split(",")} - {""}
        shared = set(next(cls for cls in kind.body.__mro__ if cls.__name__ == "PictureOptions").model_fields)
        assert named == set(kind.body.model_fields) - shared, route


VALUES = {
    "prompt": PROMPT, "n": 1, "size": "16x16", "model": "tiny", "response_format": "b64_json", "quality": "low",
    "background": "opaque", "output_format": "jpeg", "output_compression": 50, "stream": False, "partial_images": 0,
    "user": "me", "safety_identifier": "me", "complexity": "low", "input_fidelity": "low", "frame_count": 3,
    "frame_duration_ms": 100, "svg": {"model": "x"}, "style": "vivid", "moderation": "low",
}  # fmt: skip


"""A value of each parameter of the client that is not a file."""


CLIENTS_OWN = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}


REFUSED = {"markup", "frame_count", "frame_duration_ms", "svg"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_parameter_of_openais_client_is_honoured_or_refused_by_name(client: openai.OpenAI) -> None:
    page = (Path(__file__).parents[2] / "docs/http.md").read_text()
    files = {"image": ("p.png", noisy_picture(1)), "mask": ("m.png", right_half()), "markup": ("m.png", right_half())}
    images, shared = client.images, {"model", "n", "user"}
    for method, always in (
        (images.generate, ("prompt",)),
        (images.edit, ("image", "prompt")),
        (images.create_variation, ("image",)),
    ):
        names = [name for name in inspect.signature(method).parameters if name not in CLIENTS_OWN]
        assert shared | set(always) <= set(names)
        accepted = {name: (files | VALUES)[name] for name in names if name not in REFUSED}
        answer: Any = method(**accepted, extra_body={"num_inference_steps": 3})
        assert len(answer.data) == 1
        for name in names:
            assert f"`{name}`" in page, f"docs/http.md does not say what {name} does"
        for name in REFUSED & set(names):
            with pytest.raises(openai.BadRequestError, match=f"unknown parameter: {name}"):
                method(**{one: accepted[one] for one in always}, **{name: (files | VALUES)[name]})
