"""Watchers of one training in a process of their own, each on a connection of its own; a program.

    _watchers.py TARGET TRAINING_ID COUNT

It prints "ready" once each watcher has seen the training start, then, when the training has ended, one JSON line:
`latencies_ms` of all step events of all watchers, `event_times` (s) of the steps, `cpu_seconds` after "ready".
"""

import asyncio
import json
import sys
import time

import grpc
import grpc.aio

from unslothd.v1.service_pb2 import WatchTrainingRequest, WatchTrainingResponse

METHOD = "/unslothd.v1.UnslothService/WatchTraining"
Received = tuple[int, bytes]


async def watch(target: str, training_id: str, started: asyncio.Queue[None]) -> list[Received]:
    """Takes every message with the time of its arrival (ns); they are decoded later, when nothing is measured."""
    own_connection = [("grpc.use_local_subchannel_pool", 1)]
    received: list[Received] = []
    async with grpc.aio.insecure_channel(target, options=own_connection) as channel:
        call = channel.unary_stream(METHOD, request_serializer=WatchTrainingRequest.SerializeToString)
        is_waiting = True
        async for message in call(WatchTrainingRequest(training_id=training_id)):
            received.append((time.time_ns(), message))
            if is_waiting and WatchTrainingResponse.FromString(message).event.HasField("started"):
                is_waiting = False
                started.put_nowait(None)
    return received


def steps_of(received: list[Received]) -> tuple[list[float], list[float]]:
    """Milliseconds from event_time to arrival, and event_time in seconds, of each step; checks that none is missing."""
    latencies, times, last = [], [], 0
    for at_ns, message in received:
        event = WatchTrainingResponse.FromString(message).event
        if not event.sequence:
            continue
        if event.sequence != last + 1:
            raise RuntimeError(f"event {event.sequence} came after event {last}")
        last = event.sequence
        if event.HasField("step"):
            latencies.append((at_ns - event.event_time.ToNanoseconds()) / 1e6)
            times.append(event.event_time.ToNanoseconds() / 1e9)
    return latencies, times


async def main(target: str, training_id: str, count: int) -> None:
    """Watches to the end of the training."""
    started: asyncio.Queue[None] = asyncio.Queue()
    watching = [asyncio.create_task(watch(target, training_id, started)) for _ in range(count)]
    for _ in range(count):
        await started.get()
    begin = time.process_time()
    print("ready", flush=True)
    everything = await asyncio.gather(*watching)
    cpu = time.process_time() - begin
    steps = [steps_of(received) for received in everything]
    latencies = [latency for each, _ in steps for latency in each]
    print(json.dumps({"latencies_ms": latencies, "event_times": steps[0][1], "cpu_seconds": cpu}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
