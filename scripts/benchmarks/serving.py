"""Our server beside `transformers serve`, at 1, 8 and 50 clients; memory over 500 requests.

    pip install 'transformers[serving]'; python scripts/benchmarks/serving.py [--alone]

Both serve the starter in float32 on this machine, each a process of its own, asked in turns: every
client streams one chat answer of 16 tokens, greedy. Told are the median time to the first token,
and tokens a second of all clients together. Ours is asked a second time with another steering for
every client; theirs is started a second time with `--continuous-batching`. Then 500 requests, each
with its own line, and the resident memory after every 100.
`--alone` leaves the other servers out.
"""

import asyncio
import os
import socket
import statistics
import subprocess
import sys
import time

import httpx
import psutil

from interp_steer.model.loading import find_folder
from interp_steer.util.console import progress

ROUNDS = {1: 3, 8: 3, 50: 2}  # clients at once: rounds
TOKENS, MANY = 16, 500
ASK = "Tell me about the number {}, its neighbours and its uses."
ENV = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}


def free_port() -> int:
    """A port that nobody has at the moment."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def started(words: list[str], port: int, path: str) -> subprocess.Popen:
    """A server that answers already."""
    made = subprocess.Popen(words, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        try:
            if httpx.get(f"http://127.0.0.1:{port}{path}").status_code < 500:
                return made
        except httpx.HTTPError:
            pass
        if made.poll() is not None:
            sys.exit(f"{' '.join(words[:4])} ended")
        time.sleep(0.2)
    sys.exit(f"{' '.join(words[:4])} does not answer")


async def one(client: httpx.AsyncClient, port: int, body: dict) -> tuple[float, int]:
    """Seconds to the first token of an answer, and how many came."""
    begun, first, count = time.perf_counter(), 0.0, 0
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    async with client.stream("POST", url, json=body, timeout=600) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if '"content": "' in line or '"content":"' in line:
                text = line.split('"content"')[1][:6]
                if '""' in text:
                    continue
                first = first or time.perf_counter() - begun
                count += 1
    return first, count


async def asked(port: int, clients: int, body: dict, lines: list[str]) -> tuple[float, float]:
    """Median time to the first token, and tokens a second."""
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=clients)) as client:
        begun = time.perf_counter()
        bodies = [
            {**body, "messages": [{"role": "user", "content": ASK.format(n)}],
             **({"steering": lines[n % len(lines)]} if lines else {})}
            for n in range(clients)
        ]  # fmt: skip
        found = await asyncio.gather(*(one(client, port, made) for made in bodies))
        took = time.perf_counter() - begun
    return statistics.median(t for t, _ in found), sum(n for _, n in found) / took


folder, _ = find_folder("starter", None)
port = free_port()
ours = started(
    [sys.executable, "-m", "interp_steer", "serve", "--dtype", "float32", "--port", str(port)],
    port, "/health",
)  # fmt: skip
common = {"max_tokens": TOKENS, "temperature": 0, "stream": True}
theirs, ways = [], {}
for flag in () if "--alone" in sys.argv else ("", "--continuous-batching"):
    other = free_port()
    words = ["transformers", "serve", str(folder), "--port", str(other), "--host", "127.0.0.1"]
    words += ["--device", "cpu", "--dtype", "float32", *filter(None, [flag])]
    if flag:  # room for all clients; by default it takes what memory there is
        words += ["--cb-num-blocks", "128", "--cb-max-batch-tokens", "2048"]
    theirs.append(started(words, other, "/health"))
    ways[f"transformers serve {flag}".strip()] = (other, {**common, "model": str(folder)}, [])
http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
made = http.post("/api/direction", json={"feature": "smollm2-135m-instruct/13-starter-res-6k/2652"})
name = made.json()["name"]
steered = [f"add({name}, {0.05 + n / 100:.2f} dose) at {n % 20 + 5}" for n in range(50)]
ways["interp-steer"] = (port, {**common, "model": "starter"}, [])
ways["interp-steer, 50 lines"] = (port, {**common, "model": "starter"}, steered)
try:
    print(f"{'':40}{'clients':>8}{'first token':>13}{'tokens/s':>10}   medians of rounds in turns")
    for clients, rounds in ROUNDS.items():
        seen: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        warm = clients == 1  # one round more, which does not count
        for turn in range(rounds + warm):
            for way, (where, body, lines) in ways.items():
                if found := asyncio.run(asked(where, clients, body, lines)):
                    seen[way] += [found] if turn or not warm else []
        for way, values in seen.items():
            first, rate = (statistics.median(part) for part in zip(*values, strict=True))
            print(f"{way:40}{clients:8}{first:11.2f} s{rate:10.1f}", flush=True)
    for server in theirs:
        server.terminate()
    process = psutil.Process(ours.pid)
    print("\nrequests  resident MB")
    with progress("requests", MANY) as report:
        for done in range(0, MANY, 10):
            if done % 100 == 0:
                print(f"{done:8}{process.memory_info().rss / 2**20:13.0f}", flush=True)
            body = {**common, "model": "starter", "max_tokens": 8}
            asyncio.run(asked(port, 10, body, steered[done // 10 % 50 :][:10]))
            report(done + 10)
    print(f"{MANY:8}{process.memory_info().rss / 2**20:13.0f}")
finally:
    for server in (ours, *theirs):
        server.terminate()
