"""The examples of README and docs/serving_http.md do what they say."""

import json
import re

import httpx
import numpy as np
from http_serving import serving, write_video
from PIL import Image

from segmentation_service.client import LocalClient
from segmentation_service.serve_config import ServeConfig
from segmentation_service.service import SegmentationService
from tests.conftest import ROOT, TOY

DOC = (ROOT / "docs/serving_http.md").read_text()


def test_the_examples_run_and_agree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "frames")
    write_video(tmp_path / "roots/street", frames=13)
    (tmp_path / "uploads").mkdir()
    config = ServeConfig(roots=["roots"], uploads="uploads")
    config.segmentation.checkpoint, config.segmentation.device = str(TOY / "sam2"), "cpu"
    in_process, by_http = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
    exec(in_process.replace("facebook/sam2.1-hiera-large", str(TOY / "sam2")), {})
    expected = np.asarray(Image.open("overlay.png"))
    (tmp_path / "overlay.png").unlink()
    with serving(LocalClient(SegmentationService.load(config)), config) as url:
        exec(by_http.replace("http://127.0.0.1:8000", url), {})
        body = json.loads(re.search(r"-d '\n(.*?)'", DOC, re.DOTALL)[1])
        assert httpx.post(f"{url}/v1/segment", json=body, timeout=60).status_code == 422, "this server does not propagate"
        answer = httpx.post(f"{url}/v1/segment", json={**body, "propagate": False}, timeout=60).json()
        assert [len(masks) for masks in answer["masks"]] == [2] and answer["tracks"] is None
    assert (np.asarray(Image.open("overlay.png")) == expected).all()
    (readme,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(readme.replace("clip.mp4", "frames").replace("facebook/sam2.1-hiera-large", str(TOY / "sam2")), {})
    assert (np.asarray(Image.open("overlay.png")) == expected).all()
    changed = (expected != np.asarray(Image.open("frames/000.png"))).any(-1)
    assert 0.6 < changed[44:77, 24:57].mean() and changed.mean() < 0.2
