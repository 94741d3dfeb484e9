"""The answer to GET /, without a browser: what the page may do, and what it says of the server."""

import json
import re
from typing import Any

import httpx

from pipeline.recipe.picture_card import ModelCard
from pipeline.serve.api import ApiSettings, create_app


def test_the_page_is_allowed_its_own_script_and_nothing_else(server: Any) -> None:
    answer = httpx.get(server.url)
    policy = answer.headers["Content-Security-Policy"]
    assert answer.headers["Content-Type"].startswith("text/html")
    [encoded] = re.findall(r'<script type="application/json" id="facts">(.*)</script>', answer.text)
    facts = json.loads(encoded)
    assert (facts["model"], facts["image_px"], facts["neighbours"]) == ("tiny", 32, True)
    assert "/v1/images/generations" in facts["routes"]
    assert facts["sampling"].keys() == server.cascade.settings.keys()
    assert "default-src 'none'" in policy
    assert "'unsafe-inline'" not in policy
    assert "src=" not in answer.text  # nothing comes from elsewhere


def test_the_name_of_a_recipe_is_only_text_in_the_page(server: Any, serving: Any) -> None:
    card = ModelCard("</script><script>alert(1)</script>", 32)
    with serving(create_app(server.engine, None, ApiSettings(card))) as url:
        text = httpx.get(url).text
    assert card.name not in text
    assert json.loads(text.split('id="facts">')[1].split("</script>")[0])["model"] == card.name
