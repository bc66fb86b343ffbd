"""`videoseg demo`: a page in the browser for what `videoseg segment` does; the models stay loaded between questions.

Questions come from threads of the page and are answered one at a time by the main thread, as by the command: there Ctrl-C ends the one at work.
"""

from __future__ import annotations

import html
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from socket import socket
from typing import Any

import numpy as np
from PIL import Image

from rollout.engine import EngineBroken
from rollout.frame_samplers import FrameSampler
from rollout.toy_data import FPS
from rollout.toy_world import make_video
from segmentation_service.http_server import PortInUse, address, listen, server
from segmentation_service.overlay import draw_overlay, draw_points
from segmentation_service.video import read_frames
from segmentation_service.video_writer import write_video

from cluster.errors import UserError, user_error
from cluster.inference import MASKED, Inference, check_tracking
from cluster.policies import Policy
from cluster.segment import Sampling, segment_videos
from cluster.segment_output import ANSWER, MASKS, OVERLAY

PORT = 7860  # Gradio's own
MAX_UPLOAD, MAX_WAITING = "1gb", 20
CACHE_SECONDS = (600, 3600)  # how often files of the page are looked through, and at what age they go
FRAME_HEIGHT = 480  # pixels, to which smaller frames are enlarged before anything is drawn in
EXAMPLES = ((562, "the largest shape"), (592, "the white cross"), (502, "the green square"), (518, "the yellow triangle"))
"""Seeds of toy videos with a query that the toy policy answers."""

SAID = {
    "empty": "The policy says that nothing in the video fits the query.",
    "no_mask": "The policy names objects, but none of them covers a pixel.",
    "unparsable": "No object can be read from what the policy wrote.",
}
"""Of answers without a mask. Others (`too_long`, `unreadable`) bring an error."""
CSS = """
.shown, .shown .grid-wrap { height: auto !important; min-height: 0 !important; max-height: none !important }
.shown .grid-container { grid-template-columns: repeat(auto-fill, minmax(120px, 1fr)) !important; height: auto !important }
button[aria-label="Trim video to selection"] { display: none }  /* it would fetch an ffmpeg from the internet */
.html-container:has(.status) { padding: 0 !important }
.status { padding: .6em .9em; border-radius: 8px; border-left: 4px solid var(--neutral-400); background: var(--background-fill-secondary) }
.status.ok { border-color: #16a34a } .status.none { border-color: #d97706 } .status.error { border-color: #dc2626 }
"""


@dataclass(frozen=True)
class Reply:
    """What the page shows of a question. kind: `ok`, `none` (an answer without a mask) or `error`. target: the target frame with masks, boxes and points,
    shown: the others with masks and captions, RGB uint8 (H, W, 3). record: answer.json."""

    kind: str
    message: str
    overlay: Path | None = None
    target: np.ndarray | None = None
    shown: Sequence[tuple[np.ndarray, str]] = ()
    reasoning: str = ""
    record: dict[str, Any] | None = None

    def values(self) -> tuple[Any, ...]:
        """Of the page's components."""
        return _status(self.message, self.kind), self.overlay and str(self.overlay), self.target, self.reasoning, list(self.shown), self.record


class Left(Exception):
    """Nobody waits for the answer any more."""


@dataclass
class Question:
    """said: how it goes (str), then the Reply, then None. out: a folder for its files. left: nobody waits for it any more."""

    video: str | None
    query: str
    out: Path
    said: SimpleQueue[str | Reply | None] = field(default_factory=SimpleQueue)
    left: bool = False

    def note(self, text: str) -> None:
        if self.left:
            raise Left
        self.said.put(text)


@dataclass(frozen=True)
class Kept(Sampling):
    """A sampler that is not closed after a question."""

    kept: FrameSampler | None = None

    @contextmanager
    def sampler(self, policy: Policy) -> Iterator[FrameSampler]:
        yield self.kept


class Desk:
    """Where questions wait for the thread that answers them. Files of answers lie in a folder."""

    def __init__(self, folder: str) -> None:
        self._folder, self._waiting = folder, SimpleQueue[Question]()

    def ask(self, video: str | None, query: str) -> Iterator[str | Reply]:
        """How it goes, and at last the Reply, whose files are there until the generator goes on or is closed."""
        with tempfile.TemporaryDirectory(dir=self._folder, ignore_cleanup_errors=True) as out:
            question = Question(video, query or "", Path(out))
            self._waiting.put(question)
            try:
                yield from iter(question.said.get, None)
            finally:
                question.left = True

    def answer(self, model: Inference, sampling: Sampling) -> None:
        """Answers questions until an exception comes from outside, such as KeyboardInterrupt. Raises EngineBroken, since no other question could be answered either."""
        try:
            while True:
                question = self._waiting.get()
                try:
                    question.said.put(reply(model, sampling, question))
                except Left:
                    pass
                except Exception as error:
                    question.said.put(_refusal(error, question))
                    if isinstance(error, EngineBroken):
                        raise
                finally:
                    question.said.put(None)
        finally:
            try:
                while True:
                    self._waiting.get_nowait().said.put(None)
            except Empty:
                pass


def reply(model: Inference, sampling: Sampling, question: Question) -> Reply:
    """`videoseg segment` for one question. Raises UserError, PromptError and whatever else that does."""
    if not question.video:
        raise UserError("there is no video", "upload one, or choose an example")
    if not question.query.strip():
        raise UserError("the query is empty", "write what to segment, for example: the red circle")

    @contextmanager
    def loaded(policy: Policy) -> Iterator[Inference]:
        question.note("The policy reads the frames and thinks ...")
        yield model

    video = Path(question.video)
    (place,) = segment_videos(model.policy, [video], [question.query], question.out, sampling, note=question.note, note_seconds=0, start=loaded)
    record = json.loads((place / ANSWER).read_text(encoding="utf-8"))
    record["video"] = video.name
    count, status = len(record["objects"]), record["status"]
    if status == "ok":
        message = f"{count} object{'s' * (count > 1)} in {record['num_frames']} frame{'s' * (record['num_frames'] > 1)}, {sum(record['seconds'].values()):.1f} s"
    else:
        message = SAID.get(status) or record["error"].replace(f"{video.parent}/", "")
    kind, reasoning = "ok" if status == "ok" else "none" if status in SAID else "error", record["reasoning"] or record["completion"] or ""
    if status not in MASKED:
        return Reply(kind, message, reasoning=reasoning, record=record)
    drawn = _drawn(video, place, record)
    return Reply(kind, message, place / OVERLAY, drawn[record["target_frame"]], [(drawn[t], f"frame {t}") for t in record["shown_frames"]], reasoning, record)


def _refusal(error: Exception, question: Question) -> Reply:
    """An error in words; one that nobody in front of the page can mend has its traceback in the terminal."""
    known = user_error(error)
    if known is None:
        if not question.left:  # else its folder was taken away
            traceback.print_exception(error)
        return Reply("error", f"An error in the program ({type(error).__name__}); its traceback is in the terminal of `videoseg demo`.")
    return Reply("error", "; ".join(filter(None, known)))


def _drawn(video: Path, place: Path, record: dict[str, Any]) -> dict[int, np.ndarray]:
    """The frames that the policy was shown, by number, RGB uint8 (H, W, 3): with their masks, the target frame also with the answer's boxes and points."""
    target, objects, drawn = record["target_frame"], record["objects"], {}
    times = max(1, round(FRAME_HEIGHT / record["height"]))
    larger = lambda values_HW: values_HW.repeat(times, 0).repeat(times, 1)
    for t, frame_HW3 in read_frames(video, [target, *record["shown_frames"]]).items():
        numbers_HW = np.asarray(Image.open(place / MASKS / f"{t:05d}.png"))
        masks = [larger(numbers_HW == o["object"]) for o in objects]
        boxes = [o["box"] and [times * v for v in o["box"]] for o in objects] if t == target else None
        drawn[t] = draw_overlay(larger(frame_HW3), masks, boxes)
    for name, fill, edge in (("points", "white", "black"), ("negative_points", "black", "white")):
        drawn[target] = draw_points(drawn[target], [[times * v for v in point] for o in objects for point in o[name]], fill, edge)
    return drawn


def serve(policy: Policy, sampling: Sampling, host: str = "127.0.0.1", port: int | None = None, toy: bool = False) -> None:
    """Serves the page until Ctrl-C or SIGTERM (KeyboardInterrupt). port: None for PORT, or a free one where that is taken. toy: with examples of the
    toy world. Raises UserError before anything is loaded."""
    sampling.check(policy)
    check_tracking(policy.settings)
    with tempfile.TemporaryDirectory(prefix="videoseg-demo-", ignore_cleanup_errors=True) as folder, _listening(host, port) as listening:
        gradio, desk = _gradio(f"{folder}/gradio"), Desk(folder)
        examples = write_examples(Path(folder)) if toy else []
        app = make_page(gradio, desk, f"{policy.name} on {policy.settings.cluster.device}", examples)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        print(f"starting {policy.name} on {policy.settings.cluster.device} ...", file=sys.stderr, flush=True)
        with Inference(policy) as model, sampling.sampler(policy) as sampler, _serving(app, listening):
            print(f"demo at {address(listening)}; Ctrl-C stops it", flush=True)
            desk.answer(model, Kept(sampling.name, sampling.settings, sampler))


def write_examples(folder: Path) -> list[list[str]]:
    """[video, query] of each of EXAMPLES."""
    files = []
    for seed, query in EXAMPLES:
        video = make_video(seed)
        files.append([str(write_video(folder / f"toy{seed}.mp4", map(video.frame, range(video.num_frames)), FPS)), query])
    return files


def _listening(host: str, port: int | None) -> socket:
    try:
        return listen(host, PORT if port is None else port)
    except PortInUse as error:
        if port is not None:
            raise UserError(str(error).partition(";")[0], "choose another with --port N (0: any free one)") from error
        return listen(host, 0)


def _gradio(folder: str) -> Any:
    """The package, told before its import to keep its files in this folder and to report to nobody. Raises UserError where it is not installed."""
    Path(folder).mkdir()
    os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False")
    try:
        import gradio
    except ImportError as error:
        raise UserError(f"`videoseg demo` needs the package gradio ({error})", "pip install 'videoseg-r1[demo]'") from error
    return gradio


def make_page(gradio: Any, desk: Desk, about: str, examples: Sequence[Sequence[str]]) -> Any:
    """The page as an ASGI application. about: who answers. examples: a video and a query each."""
    from fastapi import FastAPI

    def ask(video: str | None, query: str) -> Iterator[tuple[Any, ...]]:
        yield Reply("", "Waiting ...").values()
        for said in desk.ask(video, query):
            yield said.values() if isinstance(said, Reply) else (_status(said), *[gradio.skip()] * (len(outputs) - 1))

    async def uploaded(path: str) -> str | None:
        if path.startswith(("http:", "https:")):
            raise gradio.Error("A video is uploaded, not linked to.", print_exception=False)
        return await fetch(path)

    with gradio.Blocks(title="VideoSeg-R1", analytics_enabled=False, delete_cache=CACHE_SECONDS) as blocks:
        gradio.Markdown(f"# VideoSeg-R1\nReasoning video object segmentation: a video and a query in, masks and the reasoning behind them out. `{about}` answers.")
        with gradio.Row():
            with gradio.Column(scale=2, min_width=320):
                video = gradio.Video(label="Video", sources=["upload"], height=280, loop=True)
                query = gradio.Textbox(label="Query", placeholder="what to segment, for example: the shape that turns back", lines=1)
                button = gradio.Button("Segment", variant="primary")
                if examples:
                    gradio.Examples([list(e) for e in examples], [video, query], label="Examples: toy world", cache_examples=False)
            with gradio.Column(scale=3, min_width=320):
                status = gradio.HTML(_status("Upload a video" + " or choose an example" * bool(examples) + ", and write a query."))
                with gradio.Row():
                    overlay = gradio.Video(label="Masked video", interactive=False, autoplay=True, loop=True, height=280, min_width=280)
                    target = gradio.Image(label="Target frame: boxes and points as answered", interactive=False, height=280, min_width=280, format="png", buttons=["download", "fullscreen"])
                reasoning = gradio.Textbox(label="Reasoning", lines=2, max_lines=20, interactive=False)
                shown = gradio.Gallery(label="Frames that the policy was shown besides", columns=4, height=None, object_fit="contain", interactive=False, format="png", elem_classes="shown")
                with gradio.Accordion("answer.json", open=False):
                    record = gradio.JSON(show_label=False)
        fetch = video.async_move_resource_to_block_cache
        video.async_move_resource_to_block_cache = uploaded  # Gradio would fetch a video of which only the address is given
        outputs = [status, overlay, target, reasoning, shown, record]
        gradio.on([button.click, query.submit], ask, [video, query], outputs, api_name="segment", scroll_to_output=True, show_progress="minimal", show_progress_on=[status])
    blocks.queue(default_concurrency_limit=1, max_size=MAX_WAITING)
    app = gradio.mount_gradio_app(
        FastAPI(openapi_url=None), blocks, "/", footer_links=[], run_history=False, max_file_size=MAX_UPLOAD, show_error=True, ssr_mode=False, mcp_server=False, pwa=False,
        enable_monitoring=False, allowed_paths=[], css=CSS,
    )  # fmt: skip
    blocks.has_launched = True  # unless this is set, Gradio takes any file of this machine for an uploaded one
    return app


def _status(text: str, kind: str = "") -> str:
    return f'<div class="status {kind}" role="status">{html.escape(text)}</div>'


@contextmanager
def _serving(app: Any, listening: socket) -> Iterator[None]:
    """The HTTP server in a thread, for as long as the context lasts."""
    http = server(app)
    thread = threading.Thread(target=http.run, kwargs={"sockets": [listening]}, name="http", daemon=True)
    thread.start()
    try:
        yield
    finally:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what is cut off now is no error
        http.should_exit = http.force_exit = True  # pages that are open keep a connection for as long as they are
        thread.join()
