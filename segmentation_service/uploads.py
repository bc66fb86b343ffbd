"""Uploaded videos on disk: a ZIP of frames, or one image, is checked and becomes a folder of frames, which lives for a while."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import secrets
import shutil
import threading
import time
import zipfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .service_request import ServiceError
from .video import SUFFIXES

_ID = re.compile(r"[0-9a-f]{32}")
_NOT_READY = "."  # begins the name of a folder that is arriving or being deleted
_BYTES_PER_PIXEL = 8  # 16 bits of four channels, not compressed
_DIRECTORY_BYTES_PER_FRAME = 1024  # of a ZIP's list of contents


@dataclass(frozen=True)
class Upload:
    """A video that was kept; name is its folder."""

    name: str
    frames: int
    height: int
    width: int


class UploadStore:
    """A folder with a folder of images for each upload. Its name of 128 random bits is all that protects it from other clients.

    max_bytes bounds the body and what is unpacked from it, quota_bytes all uploads together, max_pixels each frame.
    """

    def __init__(self, folder: str | Path, max_bytes: int, quota_bytes: int, lifetime_seconds: float, max_frames: int, max_pixels: int) -> None:
        self.folder = Path(folder)
        self.max_bytes, self.quota_bytes, self.lifetime_seconds = max_bytes, quota_bytes, lifetime_seconds
        self.max_frames, self.max_pixels = max_frames, max_pixels
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = threading.Lock()
        self._bytes = {f.name: sum(image.stat().st_size for image in f.iterdir()) for f in self.folder.iterdir() if _ID.fullmatch(f.name)}
        self.sweep()

    async def receive(self, body: AsyncIterator[bytes]) -> Upload:
        """Write the body to disk as it comes, check every frame, and keep it.

        Raises ServiceError: 413 over a limit, 422 where it is neither a ZIP of JPEG and PNG frames of one size nor such an image,
        503 where the quota is used up.
        """
        await asyncio.to_thread(self.sweep)
        name = secrets.token_hex(16)
        work = self.folder / f"{_NOT_READY}{name}"
        (work / name).mkdir(parents=True)
        try:
            with open(work / "body", "wb") as file:
                async for piece in body:
                    self._reserve(work.name, len(piece))
                    await asyncio.to_thread(file.write, piece)
        except BaseException:
            await asyncio.shield(asyncio.to_thread(self._clear, work))
            raise
        gone = threading.Event()
        try:  # shielded, since a thread that has begun cannot be cancelled: it must clear up behind itself
            return await asyncio.shield(asyncio.to_thread(self._keep, work, name, gone))
        except asyncio.CancelledError:
            gone.set()
            raise

    def delete(self, name: str) -> None:
        """Raises ServiceError 404 where there is no such upload."""
        gone = self.folder / f"{_NOT_READY}{secrets.token_hex(16)}"
        try:
            if not _ID.fullmatch(name):
                raise FileNotFoundError
            (self.folder / name).rename(gone)  # at once, so that nobody sees a video that lacks frames
        except FileNotFoundError as error:
            raise ServiceError(404, "no such upload; it may have expired") from error
        self._forget(name)
        shutil.rmtree(gone, ignore_errors=True)

    def touch(self, name: str) -> None:
        """An upload that is used lives on."""
        if _ID.fullmatch(name):
            with contextlib.suppress(FileNotFoundError):
                os.utime(self.folder / name)

    def sweep(self) -> None:
        """Delete what was not used for the lifetime, and what a server that was killed left half-done."""
        for folder in self.folder.iterdir():
            try:
                if time.time() - folder.stat().st_mtime < self.lifetime_seconds:
                    continue
                if _ID.fullmatch(folder.name):
                    self.delete(folder.name)
                elif _ID.fullmatch(folder.name.removeprefix(_NOT_READY)) and folder.name not in self._bytes:
                    shutil.rmtree(folder, ignore_errors=True)
            except (FileNotFoundError, ServiceError):
                continue  # someone else was faster

    @property
    def bytes_used(self) -> int:
        with self._lock:
            return sum(self._bytes.values())

    def _reserve(self, name: str, count: int) -> None:
        with self._lock:
            if sum(self._bytes.values()) + count > self.quota_bytes:
                raise ServiceError(503, "there is no room for more uploads now; delete some, or wait until they expire", 60)
            self._bytes[name] = self._bytes.get(name, 0) + count

    def _keep(self, work: Path, name: str, gone: threading.Event) -> Upload:
        """Check the body frame by frame, writing each into a folder, and give that its final place."""
        count, total, hw = 0, 0, None
        try:
            for i, (source, data) in enumerate(self._frames(work / "body")):
                if gone.is_set():
                    raise ServiceError(408, "the client has left, or its time is over")
                if i == self.max_frames:
                    raise ServiceError(413, f"the upload has more than {self.max_frames} frames, which is the limit")
                suffix, frame_hw = self._check_frame(source, data)
                if hw is not None and frame_hw != hw:
                    raise ServiceError(422, f"{source} is {frame_hw[0]}x{frame_hw[1]} (height x width), those before it {hw[0]}x{hw[1]}; all must be alike")
                count, total, hw = count + 1, total + len(data), frame_hw
                self._reserve(work.name, len(data))
                (work / name / f"{i:06d}{suffix}").write_bytes(data)
            if hw is None:
                raise ServiceError(422, "the ZIP holds no JPEG or PNG frames")
            with self._lock:
                self._bytes[name] = total
            (work / name).rename(self.folder / name)
            return Upload(name, count, *hw)
        finally:
            self._clear(work)

    def _clear(self, work: Path) -> None:
        shutil.rmtree(work, ignore_errors=True)
        self._forget(work.name)

    def _forget(self, name: str) -> None:
        with self._lock:
            self._bytes.pop(name, None)

    def _frames(self, file: Path) -> Iterator[tuple[str, bytes]]:
        """(name, content) of each frame, in the order of the names."""
        if file.stat().st_size > self.max_bytes:
            raise ServiceError(413, f"the upload has more than {self.max_bytes} bytes, which is the limit")
        with open(file, "rb") as opened:
            if opened.read(2) != b"PK":
                self._check_bytes("the upload", file.stat().st_size)
                yield "the upload", file.read_bytes()
                return
        try:
            with zipfile.ZipFile(_ShortReads(file, 2**17 + _DIRECTORY_BYTES_PER_FRAME * self.max_frames)) as archive:
                members = sorted((m for m in archive.infolist() if _is_visible(m)), key=lambda m: m.filename)
                if sum(m.file_size for m in members) > self.max_bytes:
                    raise ServiceError(413, f"the ZIP unpacks to more than {self.max_bytes} bytes, which is the limit")
                for member in members:
                    if PurePosixPath(member.filename).suffix.lower() not in SUFFIXES:
                        raise ServiceError(422, f"the ZIP holds {_shown(member.filename)}; frames are {', '.join(SUFFIXES)} files")
                    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                        raise ServiceError(422, f"{_shown(member.filename)} is neither stored nor deflated; use another ZIP program")
                    self._check_bytes(_shown(member.filename), member.file_size)
                    yield _shown(member.filename), archive.read(member)
        except (zipfile.BadZipFile, zipfile.LargeZipFile, RuntimeError, NotImplementedError, EOFError, ValueError, zipfile.zlib.error) as error:
            raise ServiceError(422, f"the upload is not a readable ZIP: {error}") from error

    def _check_bytes(self, source: str, count: int) -> None:
        """Before it is read into memory."""
        if count > _BYTES_PER_PIXEL * self.max_pixels + 2**16:
            raise ServiceError(413, f"{source} has {count} bytes, which is more than an image of {self.max_pixels} pixels needs")

    def _check_frame(self, source: str, data: bytes) -> tuple[str, tuple[int, int]]:
        """The suffix and (height, width) of an image that can be decoded to its end."""
        from PIL import Image

        try:
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
                width, height = image.size
                if width * height > self.max_pixels:
                    raise ServiceError(413, f"{source} has {height}x{width} pixels; the limit is {self.max_pixels} a frame")
                image.load()
                return (".jpg" if image.format == "JPEG" else ".png"), (height, width)
        except Image.DecompressionBombError as error:
            raise ServiceError(413, f"{source} is larger than {self.max_pixels} pixels, which is the limit") from error
        except (OSError, SyntaxError, ValueError) as error:  # a broken PNG can be a SyntaxError
            raise ServiceError(422, f"{source} is not a JPEG or PNG image that can be decoded to its end") from error


class _ShortReads(io.FileIO):
    """A file that refuses to be read in large pieces: a ZIP's list of contents comes in one, and could fill the memory."""

    def __init__(self, file: Path, limit: int) -> None:
        super().__init__(file)
        self.limit = limit

    def read(self, size: int = -1) -> bytes:
        if size > self.limit:
            raise zipfile.BadZipFile(f"its list of contents has {size} bytes; the limit is {self.limit}")
        return super().read(size)


def _is_visible(member: zipfile.ZipInfo) -> bool:
    """Whether it is a file that somebody meant to send: no folder, none of the hidden files that some systems add."""
    return not member.is_dir() and not PurePosixPath(member.filename).name.startswith(".")


def _shown(name: str) -> str:
    """A name from an archive, fit for a message."""
    return repr(name[:100])
