import io
import json
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from PIL import Image, PngImagePlugin

from models.request import SampleRequest
from pipeline.errors import ConfigError
from pipeline.recipe.lineage import _picture_facts
from pipeline.recipe.picture_card import ModelCard, made_with
from pipeline.recipe.provenance import CHUNK, Signer
from pipeline.serve.picture_files import encode_picture


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "key.pem").write_bytes(pem)
    return tmp_path / "key.pem"


def signed_of(file: bytes, folder: Path) -> str:
    (folder / "picture.png").write_bytes(file)
    return _picture_facts(folder / "picture.png").get("signed", "")


def again(file: bytes, *, level: int = 0, prompt: str = "") -> bytes:
    """The same picture, compressed anew, with a pixel or the text changed."""
    with Image.open(io.BytesIO(file)) as image:
        image.load()
        texts = {name: str(image.info[name]) for name in ("unclip", CHUNK)}
        pixels = np.array(image)
    pixels[0, 0, 0] += level
    if prompt:
        texts["unclip"] = json.dumps(json.loads(texts["unclip"]) | {"prompt": prompt})
    chunks, stream = PngImagePlugin.PngInfo(), io.BytesIO()
    for name, text in texts.items():
        chunks.add_itxt(name, text)
    Image.fromarray(pixels).save(stream, "PNG", pnginfo=chunks, compress_level=1)
    return stream.getvalue()


def test_a_signed_picture_names_its_key_until_it_is_changed(key_file: Path, tmp_path: Path) -> None:
    signer = Signer.read(key_file)
    card = ModelCard("tiny", 8, networks={"decoder": "0" * 16}, signer=signer)
    image = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    chunks = made_with(card, SampleRequest("a caf\N{LATIN SMALL LETTER E WITH ACUTE}", (3,)), 3, 8)
    assert json.loads(chunks["unclip"])["actions"][0]["action"] == "c2pa.created"
    file = encode_picture(image, 8, made_with=chunks, signer=signer)
    public = signer.key.public_key().public_bytes_raw().hex()
    assert signed_of(file, tmp_path) == f"by the key {public}, and unchanged since"
    assert signed_of(again(file), tmp_path) == f"by the key {public}, and unchanged since"
    for changed in (again(file, level=1), again(file, prompt="a dog")):
        assert "does not match" in signed_of(changed, tmp_path)
    assert signed_of(encode_picture(image, 8, made_with=chunks), tmp_path) == ""


def test_a_key_that_cannot_sign_is_refused_with_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"serve\.provenance: .*openssl genpkey -algorithm ed25519"):
        Signer.read(tmp_path / "missing.pem")
    (tmp_path / "text.pem").write_text("no key")
    with pytest.raises(ConfigError, match="cannot be read as a private key"):
        Signer.read(tmp_path / "text.pem")
