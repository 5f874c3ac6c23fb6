"""A real `vllm serve` of a model folder on CPU, for tests of what is asked over HTTP."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# As engines/vllm.py sets them: float32, prompts whole, blocks of 32, nothing compiled.
FLAGS = [
    "--host",
    "127.0.0.1",
    "--dtype",
    "float32",
    "--max-model-len",
    "1024",
    "--max-num-seqs",
    "64",
    "--enforce-eager",
    "--block-size",
    "32",
    "--kv-cache-memory-bytes",
    "268435456",
    "--no-enable-chunked-prefill",
    "--max-num-batched-tokens",
    "8192",
    "--load-format",
    "safetensors",
    "--distributed-executor-backend",
    "uni",
    "--mm-processor-cache-gb",
    "0",
    "--uvicorn-log-level",
    "warning",
    "--disable-log-stats",
    "--no-enable-log-requests",
]
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCH_COMPILE_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
START_S = 240  # 20 to 30 s on two quiet cores


@contextmanager
def vllm_server(model_folder: Path | str, *flags: str) -> Iterator[tuple[str, str]]:
    """(url, key) of a server on loopback whose model is named after the folder. Its whole process group is killed at the end."""
    key = secrets.token_hex(16)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # Not the command `vllm serve`, which asks for the version of the package `vllm`: the CPU build's package has another name.
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(model_folder)]
    command += ["--served-model-name", Path(model_folder).name]
    limits = ["--limit-mm-per-prompt", '{"image": 1, "video": 0}', "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        # The key goes by the environment: a command line can be read by everyone on the machine.
        server = subprocess.Popen(
            [*command, *FLAGS, *limits, *flags], stdout=log, stderr=log, start_new_session=True, env={**os.environ, **SETTINGS, "VLLM_API_KEY": key}
        )
        try:
            for attempt in range(START_S * 2):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except (urllib.error.URLError, OSError):
                    if server.poll() is not None or attempt == START_S * 2 - 1:
                        log.seek(0)
                        raise RuntimeError(f"vllm serve did not start:\n{log.read().decode(errors='replace')[-4000:]}") from None
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1", key
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()
