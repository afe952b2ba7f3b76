"""A server in a thread on a free port, and what its clients send."""

from __future__ import annotations

import base64
import contextlib
import io
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import uvicorn
from PIL import Image

from autosteer.runtime import Engine, GatePolicy, Mode
from autosteer.runtime.serve.app import Settings, make_app
from autosteer.runtime.serve.cli import listening
from autosteer.runtime.serve.limits import Limits


@dataclass(frozen=True)
class Served:
    """A running server."""

    url: str
    model: str
    app: Any

    def openai(self, **options: Any) -> openai.OpenAI:
        """OpenAI's own client, without retries."""
        plain = openai.DefaultHttpxClient(verify=False)
        known = {"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, "http_client": plain}
        return openai.OpenAI(**known | options)

    def http(self, **options: Any) -> httpx.Client:
        """A plain client. It loads no certificates, which takes longer than a request."""
        return httpx.Client(**{"base_url": self.url, "timeout": 30.0, "verify": False} | options)

    def metric(self, name: str) -> float:
        """The sum of a metric's samples whose line starts with `name`."""
        lines = self.http().get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


@contextlib.contextmanager
def served(
    engine: Engine,
    package: Path,
    *,
    policy: str | GatePolicy = "steer",
    weakest: str = "off",
    key: str | None = None,
    grace: float = 2.0,
    **limits: Any,
) -> Iterator[Served]:
    """Serve an engine while the block runs. It then waits `grace` seconds for requests that are not answered yet."""
    gate = engine.policy(policy) if isinstance(policy, str) else policy
    settings = Settings("toy", gate, Mode(weakest), Limits(**limits), key)
    app = make_app(engine, settings, package)
    with listening("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=grace))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        try:
            yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", "toy", app)
        finally:
            server.should_exit = True
            thread.join(timeout=10)
            assert not thread.is_alive()


def data_url(colour: tuple[int, int, int] = (255, 0, 0), size: tuple[int, int] = (8, 8)) -> str:
    """A picture of one colour."""
    file = io.BytesIO()
    Image.fromarray(np.full((*size, 3), colour, np.uint8)).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def asks(*contents: Any) -> list[Any]:
    """A dialogue: the user's and the assistant's turns in alternation."""
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


def with_picture(text: str, *urls: str) -> list[dict[str, Any]]:
    """The parts of a turn with pictures."""
    return [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": text}]
