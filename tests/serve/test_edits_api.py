"""Requests that start from pictures, by OpenAI's own client and by forms, and their pictures in a crowd."""

import asyncio
import base64
import concurrent.futures
import contextlib
import inspect
import io
import json
import pickle
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from models import edit_phases
from models.cascade import Cascade
from models.edit_phases import run_phases
from models.editor import Editor, EditSettings, Latents, RecentLatents
from models.request import (
    EditError,
    Inpainting,
    Interpolation,
    RawMask,
    RawPicture,
    SampleRequest,
    StartPicture,
    TextDiff,
    Variation,
)
from models.stage import Z_IMAGE
from pipeline.sampling.masks import shrink_mask
from pipeline.serve import engine as engine_module
from pipeline.serve import uploads
from pipeline.serve.edits import EDITS
from pipeline.serve.engine import Engine
from tests.tiny.command import ROOT
from tests.tiny.shards import pixels, plain_picture

PROMPT = "a large red circle on a white background"
STEPS = {"num_inference_steps": "3"}


@pytest.fixture
def client(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


@pytest.fixture(scope="module")
def editor(server: Any) -> Editor:
    return Editor(server.cascade, EditSettings(num_steps=3))


def noisy_picture(seed: int, side_px: int = 32) -> bytes:
    levels = np.random.default_rng(seed).integers(0, 256, (side_px // 4, side_px // 4, 3), np.uint8)
    return png(levels.repeat(4, 0).repeat(4, 1))


def png(levels: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(levels).save(stream, "PNG")
    return stream.getvalue()


def right_half(side_px: int = 32, *, alpha: bool = True) -> bytes:
    """A mask of the right half: transparent there, or white there."""
    masked = np.zeros((side_px, side_px), np.uint8)
    masked[:, side_px // 2 :] = 255
    return png(np.stack([masked] * 3 + [255 - masked], axis=2) if alpha else masked)


def post(server: Any, route: str, *pictures: bytes, mask: bytes | None = None, **fields: str) -> httpx.Response:
    files = [("image[]", ("picture.png", data)) for data in pictures]
    files += [("mask", ("mask.png", mask))] if mask else []
    return httpx.post(f"{server.url}/v1/images/{route}", data=STEPS | fields, files=files, timeout=120)


def images(answer: Any) -> list[Any]:
    data = answer.json()["data"] if isinstance(answer, httpx.Response) else [one.to_dict() for one in answer.data]
    return [pixels(base64.b64decode(one["b64_json"])) for one in data]


def tensor(data: bytes) -> torch.Tensor:
    return torch.from_numpy(pixels(data).copy())[None]


def close_to(actual: Any, expected: Any) -> bool:
    difference = np.abs(np.asarray(actual).astype(int) - np.asarray(expected))
    return bool(difference.mean() < 0.1 and difference.max() < 16)


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
    assert not close_to(first, second)
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
    assert close_to(images(same)[0], run_phases(editor, request).images[0])


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
    assert not close_to(varied[0], varied[1])
    own = run_phases(editor, SampleRequest("", (5, 6), edit=Variation(raw(picture))))
    torch.testing.assert_close(own.z_image, editor.embed(tensor(picture)).expand(2, -1))
    assert all(close_to(one, other) for one, other in zip(varied, own.images, strict=True))


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
    assert all(close_to(one, other) for one, other in zip(images(answer), expected, strict=True))
    [again] = images(post(server, "reconstructions", picture, seed="5"))
    assert close_to(again, editor.reconstruct(editor.encode(tensor(picture)), [5]).images[0])


@pytest.mark.parametrize("noise", ["slerp", "fixed"])
def test_interpolations_are_those_of_the_command(server: Any, editor: Editor, noise: Any) -> None:
    one, other = noisy_picture(1), noisy_picture(2, 48)
    answer = post(server, "interpolations", one, other, n="3", seed="5", noise=noise)
    latents = [editor.encode(tensor(data)) for data in (one, other)]
    expected = editor.interpolate(latents[0], latents[1], [0.0, 0.5, 1.0], 5, noise=noise).images
    assert all(close_to(frame, same) for frame, same in zip(images(answer), expected, strict=True))
    assert [(frame["seed"], frame["share"]) for frame in answer.json()["data"]] == [(5, 0.0), (5, 0.5), (5, 1.0)]


def test_text_diffs_are_those_of_the_command(server: Any, editor: Editor) -> None:
    picture, texts = noisy_picture(1), {"source": "a red circle", "target": "a blue square"}
    answer = post(server, "text-diffs", picture, n="2", seed="5", theta="0.5", guidance_scale="1.5", **texts)
    guided = Editor(server.cascade, EditSettings(num_steps=3, latent_guidance=1.5))
    latents = guided.encode(tensor(picture))
    expected = guided.text_diff(latents, texts["source"], texts["target"], [0.0, 0.5], 5).images
    assert all(close_to(frame, same) for frame, same in zip(images(answer), expected, strict=True))
    assert [frame["theta"] for frame in answer.json()["data"]] == [0.0, 0.5]
    upsampling = sum(stage.sampler.num_steps for stage in server.cascade.after(Z_IMAGE)[1:])
    assert answer.json()["usage"]["steps"] == 3 + 2 * (3 + upsampling)
    [alone] = images(post(server, "text-diffs", picture, n="1", seed="5", theta="0.5", guidance_scale="1.5", **texts))
    assert close_to(alone, images(answer)[1])


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
        ("sdedits", {"prompt": PROMPT, "strength": "0"}, {"image": "1"}, "strength", "strength"),
        ("sdedits", {"prompt": PROMPT, "num_inference_steps": "1001"}, {"image": "1"}, "num_inference_steps", "1000"),
    ],
)  # fmt: skip
def test_wrong_forms_are_refused_by_name(
    server: Any, route: str, fields: dict[str, str], files: dict[str, str], param: str | None, words: str
) -> None:
    special = {
        "nonsense": b"GIF89a",
        "bomb": plain_picture("red", 6400),
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


def test_no_more_than_two_pictures_of_clients_are_decoded_at_once_and_other_threads_stay_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running, most, read = list[int](), list[int](), uploads.read

    def slow(data: bytes, **options: Any) -> Any:
        running.append(1)
        most.append(len(running))
        time.sleep(0.01)
        try:
            return read(data, **options)
        finally:
            running.pop()

    monkeypatch.setattr(uploads, "read", slow)

    async def decode_many() -> list[RawPicture]:
        asyncio.get_running_loop().set_default_executor(concurrent.futures.ThreadPoolExecutor(2))
        decoded = asyncio.gather(*(uploads.decoding(uploads.raw_picture, black(), "image") for _ in range(12)))
        await asyncio.wait_for(asyncio.to_thread(lambda: None), 5)
        assert not decoded.done()
        return await decoded

    pictures = asyncio.run(decode_many())
    assert len({picture.sha256 for picture in pictures}) == 1
    assert max(most) == 2


def test_the_error_of_an_edit_reaches_the_http_process_without_torch() -> None:
    code = "import pickle, sys; pickle.loads(bytes.fromhex(sys.argv[1])); sys.exit('torch' in sys.modules)"
    sent = pickle.dumps(EditError("the two ends are opposite")).hex()
    assert subprocess.run([sys.executable, "-c", code, sent], check=False, cwd=ROOT).returncode == 0


def test_a_picture_with_a_mask_is_decoded_once_as_it_was_without(monkeypatch: pytest.MonkeyPatch) -> None:
    read, calls = uploads.read, list[str]()
    monkeypatch.setattr(
        uploads, "read", lambda data, **options: calls.append(options["where"]) or read(data, **options)
    )
    levels = np.random.default_rng(0).integers(0, 256, (40, 30, 4), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(levels).save(stream, "PNG")
    picture, mask = uploads.masked_picture(stream.getvalue(), None, 16)
    assert calls == ["image"]
    assert picture == uploads.raw_picture(stream.getvalue(), "image", 16)
    assert mask is not None


def test_an_edit_that_is_refused_copies_no_picture(cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[RawPicture] = []
    tensor_of = edit_phases._tensor
    monkeypatch.setattr(edit_phases, "_tensor", lambda picture: copied.append(picture) or tensor_of(picture))
    edit = StartPicture(RawPicture(8, 8, bytes(8 * 8 * 3)), 0.5)
    phase = edit_phases.edit_phase(Editor(cascade, EditSettings(num_steps=3)), SampleRequest("a", (1,), edit=edit))
    assert not copied
    phase.batch()
    assert copied == [edit.picture]


def test_texts_that_clip_reads_as_the_same_are_400_and_stop_nothing(server: Any) -> None:
    answer = post(server, "text-diffs", noisy_picture(1), source="a red circle", target="A RED circle")
    assert answer.status_code == 400
    assert "no direction" in answer.json()["error"]["message"]
    stream = post(server, "text-diffs", noisy_picture(1), source="a red circle", target="A RED circle", stream="true")
    [event] = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: ")]
    assert (event["error"]["type"], event["error"]["code"]) == ("invalid_request_error", "invalid_value")
    assert httpx.get(f"{server.url}/healthz").json()["status"] == "ok"


def raw(data: bytes) -> RawPicture:
    levels = pixels(data)
    return RawPicture(levels.shape[1], levels.shape[0], levels.tobytes())


UNREFINED = partial(EditSettings, num_refinements=0)
"""Of networks that are not trained, refined inversions are chaotic: 1e-6 in a picture becomes 0.8 in x_T."""


def test_edits_and_generations_share_steps_and_each_is_as_alone(
    cascade: Cascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "EditSettings", UNREFINED)
    one, other, steps = raw(noisy_picture(1)), raw(noisy_picture(2)), {"decoder": 4}
    mask = RawMask(2, bytes([0, 1, 0, 1]))
    requests = [
        SampleRequest(PROMPT, (1, 2)),
        SampleRequest(PROMPT, (3,), num_steps=steps, edit=Inpainting(one, mask)),
        SampleRequest("a blue star", (4,), guidance_scale={"decoder": 1.0}, edit=StartPicture(other, 0.5)),
        SampleRequest("", (5,), edit=Variation(one)),
        SampleRequest("", (6,), num_steps=steps, edit=Variation(other, 0.9)),
        SampleRequest("", (7,), num_steps=steps, edit=Variation(other, 0.0)),
        SampleRequest("", (8, 8), num_steps=steps, edit=Interpolation((one, other), (0.3, 0.6))),
        SampleRequest("", (9,), num_steps=steps, edit=TextDiff(one, "a red circle", "a blue square", (0.4,))),
        SampleRequest(PROMPT, (1, 2)),
    ]
    editor = Editor(cascade, UNREFINED())
    alone = [run_phases(editor, request) if request.edit else cascade.sample_request(request) for request in requests]
    engine = Engine(cascade)

    async def crowd() -> list[Any]:
        return await asyncio.gather(*(engine.sample(request) for request in requests))

    try:
        answers = asyncio.run(crowd())
        counts = engine.counts()
    finally:
        engine.close()
    for answer, reference in zip(answers, alone, strict=True):
        assert close_to(answer.images, reference.images)
        np.testing.assert_allclose(answer.z_image, reference.z_image, atol=2e-4)
    assert counts["pictures"] == sum(len(request.seeds) for request in requests)
    assert counts["active"] == counts["waiting"] == 0
    assert counts["rows"] / counts["steps"] > 3


def random_request(rng: random.Random, pictures: list[RawPicture]) -> SampleRequest:
    """A request of any kind, with settings of its own."""
    one, other = rng.sample(pictures, 2)
    seeds = tuple(rng.sample(range(99), rng.choice([1, 1, 2, 3])))
    prompted: list[Any] = [None, Inpainting(one, RawMask(2, bytes([0, 1, 1, 0]))), StartPicture(one, rng.random() or 1)]
    ways: list[Any] = [
        Interpolation((one, other), (0.4,), rng.choice(["slerp", "fixed"])),
        TextDiff(one, "a red circle", rng.choice(["a blue star", "A RED circle"]), (0.5,)),
    ]
    edit = rng.choice([*prompted, Variation(one), Variation(one, rng.choice([0.0, 0.5])), *ways])
    is_prompted = edit is None or isinstance(edit, Inpainting | StartPicture)
    return SampleRequest(
        rng.choice(["two", "a red circle"]) if is_prompted else "",
        seeds[:1] if isinstance(edit, Interpolation | TextDiff) else seeds,
        guidance_scale=rng.choice([{}, {"decoder": 1.0}, {"decoder": 3.0}]),
        num_steps={"decoder": rng.choice([2, 3, 5])},
        negative_prompt=rng.choice(["", "blue"]) if is_prompted else "",
        side_px=rng.choice([0, 8, 32]),
        num_candidates=rng.choice([0, 2]) if is_prompted else 0,
        edit=edit,
    )


@pytest.mark.slow
def test_random_requests_that_come_and_go_are_each_as_alone(cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "EditSettings", UNREFINED)
    rng, pictures = random.Random(1), [raw(noisy_picture(seed)) for seed in range(4)]
    engine, editor = Engine(cascade, max_batch_size=5, max_waiting=1000), Editor(cascade, UNREFINED())
    jobs: list[Any] = []
    for _ in range(90):
        request = random_request(rng, pictures)
        jobs.append((request, engine.submit(request, client=str(rng.randrange(3)))))
        if rng.random() < 0.3:
            rng.choice(jobs)[1].cancel()
        time.sleep(rng.random() * 0.02)
    num_answers = 0
    try:
        for request, future in jobs:
            with contextlib.suppress(concurrent.futures.CancelledError, EditError):
                answer = future.result(120)
                num_answers += 1
                whole = run_phases(editor, request) if request.edit else cascade.sample_request(request)
                # Another batch rounds otherwise, which these networks carry further; another picture is 20 levels away.
                assert np.abs(answer.images.astype(int) - whole.images.numpy()).mean() < 3, request
        counts = engine.counts()
    finally:
        engine.close()
    assert num_answers > 40
    assert counts["active"] == counts["waiting"] == 0
    assert counts["rows"] / counts["steps"] > 1.5


def test_several_edits_of_a_picture_invert_it_once(cascade: Cascade) -> None:
    one, other = raw(noisy_picture(1)), raw(noisy_picture(2))
    edits = [Variation(one, 0.0), Variation(other, 0.0), Interpolation((one, other), (0.0,)), Variation(one, 0.0)]
    settings = [{}, {}, {}, {"guidance_scale": {"decoder": 1.5}}]
    engine = Engine(cascade)
    try:
        answers = [
            engine.submit(SampleRequest("", (5,), num_steps={"decoder": 4}, edit=edit, **changes)).result(60)
            for edit, changes in zip(edits, settings, strict=True)
        ]
    finally:
        engine.close()
    walk = answers[0].num_steps - 4
    assert [answer.num_steps for answer in answers] == [walk + 4, walk + 4, walk, walk + 4]
    assert close_to(answers[2].images, answers[0].images)


def test_only_the_pictures_inverted_last_are_remembered() -> None:
    recent, latents = RecentLatents(2), Latents(torch.eye(3), torch.arange(3).view(3, 1, 1, 1))
    recent.add(["a", "b", "c"], latents)
    assert recent.find(["a"]) is None
    assert recent.find(["b", "a"]) is None
    found = recent.find(["c", "b"])
    assert found is not None
    assert found.x_T.flatten().tolist() == [2, 1]


def test_a_cancelled_edit_leaves_between_its_phases_too(cascade: Cascade) -> None:
    engine = Engine(cascade)
    try:
        future = engine.submit(SampleRequest("", (1,) * 4, edit=Variation(raw(noisy_picture(1)), 0.5)))
        assert future.cancel()
        again = engine.submit(SampleRequest(PROMPT, (1,)))
        assert again.result(timeout=60).images.shape[0] == 1
        assert engine.counts()["active"] == engine.counts()["waiting"] == 0
    finally:
        engine.close()


def test_a_smaller_mask_covers_every_pixel_that_it_touches() -> None:
    masked = np.random.default_rng(0).random((37, 37)) > 0.98
    expected = torch.nn.functional.adaptive_max_pool2d(torch.from_numpy(masked)[None, None].float(), 16)[0, 0] > 0
    np.testing.assert_array_equal(shrink_mask(masked, 16), expected.numpy())
    np.testing.assert_array_equal(shrink_mask(masked, 64), masked)


@pytest.mark.parametrize("form", ["float", "base64"])
def test_openais_client_embeds_texts_and_pictures(server: Any, client: openai.OpenAI, form: Any) -> None:
    picture = noisy_picture(1)
    url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    answer = client.embeddings.create(input=["a red circle", url, "a blue star"], model="tiny", encoding_format=form)
    rows = [entry.embedding for entry in answer.data]
    if form == "base64":
        rows = [np.frombuffer(base64.b64decode(str(row)), np.float32) for row in rows]
    editor = Editor(server.cascade)
    texts, seen = server.cascade.clip.embed_text(["a red circle", "a blue star"]), editor.embed(tensor(picture))
    for row, expected in zip(rows, [texts[0], seen[0], texts[1]], strict=True):
        np.testing.assert_allclose(row, expected.numpy(), atol=1e-5)
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    assert len(client.embeddings.create(input="a", model="tiny").data[0].embedding) == len(texts[0])


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"input": [1, 2]}, 400, "input"),
        ({"input": [[1]]}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": ""}, 400, "input"),
        ({"input": ["a"] * 2049}, 400, "input"),
        ({"input": ["data:image/png;base64,AAAA"] * 33}, 400, "input"),
        ({"input": "data:image/png;base64,AAAA"}, 400, "input"),
        ({"input": "a", "dimensions": 3}, 400, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format"),
        ({"input": "a", "model": "text-embedding-3-small"}, 404, "model"),
        ({"input": "a", "pooling": "mean"}, 400, "pooling"),
    ],
)
def test_wrong_embeddings_are_refused_by_name(server: Any, body: Any, status: int, param: str) -> None:
    answer = httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=60)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


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
    "frame_duration_ms": 100, "svg": {"model": "x"},
}  # fmt: skip
"""A value of each parameter of the client that is not a file."""
CLIENTS_OWN = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
REFUSED = {"markup", "frame_count", "frame_duration_ms", "svg"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_parameter_of_openais_client_is_honoured_or_refused_by_name(client: openai.OpenAI) -> None:
    page = (Path(__file__).parents[2] / "docs/http.md").read_text()
    files = {"image": ("p.png", noisy_picture(1)), "mask": ("m.png", right_half()), "markup": ("m.png", right_half())}
    for method, always in ((client.images.edit, ("image", "prompt")), (client.images.create_variation, ("image",))):
        names = [name for name in inspect.signature(method).parameters if name not in CLIENTS_OWN]
        assert {"image", "model", "n", "user"} <= set(names)
        accepted = {name: (files | VALUES)[name] for name in names if name not in REFUSED}
        answer: Any = method(**accepted, extra_body=STEPS)
        assert len(answer.data) == 1
        for name in names:
            assert f"`{name}`" in page, f"docs/http.md does not say what {name} does"
        for name in REFUSED & set(names):
            with pytest.raises(openai.BadRequestError, match=f"unknown parameter: {name}"):
                method(**{one: accepted[one] for one in always}, **{name: (files | VALUES)[name]})
