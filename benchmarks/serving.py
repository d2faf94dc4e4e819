"""Throughput of a server and of captions: python -m benchmarks.serving MODEL_DIR [--json FILE]

Clients ask one question after another about one kept picture, each answered with --tokens tokens; those that wait share
the model's steps. Then a short text question arrives while an answer of 200 tokens runs. At last a folder of
photographs is captioned, in batches and with two processes. Keys of the JSON: tokens_per_s by clients,
tokens_per_s_over_one; newcomer: seconds until its first token, seconds of the running answer's steps before, with and
after it (medians); pictures_per_minute by "workers x batch".
"""

import argparse
import asyncio
import io
import itertools
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.benchmark import provenance, report
from ov_mllama.export.samples import photographs
from ov_mllama.serving import load
from ov_mllama.serving.images import ImageFile
from ov_mllama.serving.parsing import GenerationRequest
from ov_mllama.serving.scheduler import Scheduler


def question(picture: ImageFile, words: str, tokens: int) -> GenerationRequest:
    """Return a question about an image."""
    content = [{"type": "image"}, {"type": "text", "text": words}]
    return GenerationRequest([{"role": "user", "content": content}], [picture], tokens)


async def ask_all(batches: Scheduler, picture, clients: int, rounds: int, tokens: int) -> float:
    """Return tokens a second of so many clients, each with so many questions."""
    total = 0

    async def client(number: int) -> None:
        nonlocal total
        for i in range(rounds):
            asked = await batches.submit(question(picture, f"What is number {number * rounds + i} here?", tokens))
            async for _ in asked.chunks():
                pass
            total += asked.sequence.num_tokens

    started = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(clients)))
    return total / (time.perf_counter() - started)


async def token_times(batches: Scheduler, words: str, tokens: int, times: list[float]) -> None:
    """Ask a question without an image; append the time of each token of its answer."""
    pending = await batches.submit(GenerationRequest([{"role": "user", "content": words}], [], tokens))
    while not pending.finished:
        await asyncio.sleep(0.002)
        times += [time.perf_counter()] * (pending.sequence.num_tokens - len(times))


async def newcomer(batches: Scheduler, tokens: int = 200) -> dict[str, float]:
    """Return the times of a short text question that arrives while an answer of so many tokens runs."""
    alone, running, joined = [], [], []
    started = time.perf_counter()
    await token_times(batches, "Who was here before?", 1, alone)
    alone_s = alone[0] - started
    task = asyncio.create_task(token_times(batches, "Count the days of the year.", tokens, running))
    while len(running) < tokens // 4:
        await asyncio.sleep(0.002)
    started = time.perf_counter()
    await token_times(batches, "Who are you?", 32, joined)
    await task
    steps = {"alone": [], "of_two": []}
    for begin, end in itertools.pairwise(running):
        if end < started or begin > joined[-1]:
            steps["alone"].append(end - begin)
        elif joined[0] < begin and end < joined[-1]:
            steps["of_two"].append(end - begin)
    result = {f"step_{name}_s": statistics.median(each) for name, each in steps.items() if each}
    longest = max(end - begin for begin, end in itertools.pairwise(running))
    return {"first_token_alone_s": alone_s, "first_token_s": joined[0] - started, "longest_step_s": longest, **result}


def captioned(model_dir: Path, pictures: Path, workers: int, batch: int, tokens: int) -> float:
    """Return images a minute, from the first results on, without loading the models."""
    from ov_mllama.serving.caption import caption

    with tempfile.TemporaryDirectory() as out:
        count = caption(pictures, "What is here?", out, model_dir, tokens, batch, workers)
        times = sorted(part.stat().st_mtime for part in Path(out).iterdir())
    return 60 * (count - batch) / (times[-1] - times[0])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--rounds", type=int, default=3, help="questions of each client")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--captions", nargs="*", default=["1x1", "1x4", "1x8", "2x4"], help="workers x batch")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, processor = load(options.model_dir, check_golden=False)
    batches = Scheduler(model, processor)
    file = io.BytesIO()
    photographs()[0]["image"].save(file, "png")
    picture = ImageFile.from_bytes(file.getvalue())
    asyncio.run(ask_all(batches, picture, 1, 1, 4))  # its picture is kept from here on
    speed = {}
    for clients in options.clients:
        speed[clients] = asyncio.run(ask_all(batches, picture, clients, options.rounds, options.tokens))
        print(f"{clients} clients: {speed[clients]:.1f} tokens/s", flush=True)
    joined = asyncio.run(newcomer(batches))
    print(", ".join(f"{name}: {seconds:.3f}" for name, seconds in joined.items()), flush=True)
    rss = psutil.Process().memory_info().rss / 1e9
    batches.close()
    del model, batches
    pictures = Path(tempfile.mkdtemp())
    for i in range(3):
        for sample in photographs():
            sample["image"].rotate(i).save(pictures / f"{i}-{sample['name']}.png")
    per_minute = {}
    if options.captions:
        from ov_mllama.serving.caption import init_ray

        init_ray()
    for case in options.captions:
        workers, batch = map(int, case.split("x"))
        per_minute[case] = captioned(options.model_dir, pictures, workers, batch, options.tokens)
        print(f"{case}: {per_minute[case]:.1f} pictures a minute", flush=True)
    shutil.rmtree(pictures)
    result = {
        **provenance("benchmarks.serving"),
        "tokens_per_s": speed,
        "tokens_per_s_over_one": {clients: each / speed[options.clients[0]] for clients, each in speed.items()},
        "newcomer": joined,
        "rss_gb": rss,
        "pictures_per_minute": per_minute,
    }
    report(result, options.json)


if __name__ == "__main__":
    main()
