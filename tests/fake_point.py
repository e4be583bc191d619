"""Stands in for `jaxscale.sweep.measure`: needs 1000 bytes per token and batch row, at once.

What a length does otherwise is in BEHAVIOUR. Each request is noted in the file $POINTS names.
"""

import json
import os
import signal
import sys
import time

BEHAVIOUR = {13: "kill", 17: "crash", 19: "segfault", 23: "hang", 29: "refuse", 31: "bad_alloc"}


def main() -> None:
    request = json.loads(sys.stdin.readline())
    known = {}

    def report(**fields: object) -> None:
        known.update(fields)
        with open(request["report"], "w") as file:
            json.dump(known, file)

    if request["task"] == "look":
        environment = {"device_kind": "toy", "num_devices": 1, "fake_devices": False}
        environment["packages"] = {}
        report(environment=environment, platform="cpu", num_devices=1, memory_bytes=None)
        return
    config = request["config"]
    length, batch = config["data"]["length"], config["train"]["global_batch_size"]
    with open(os.environ["POINTS"], "a") as file:
        file.write(f"{length} {batch} {os.getpid()}\n")
    needed = 1000 * length * batch // (2 if config["model"]["attention"] == "chunked" else 1)
    report(needed_bytes=needed, peak_bytes=needed, temporary_bytes=needed, flops=1.0 * length)
    report(peak_bytes_source="compiler", state_bytes=10)
    behaviour = BEHAVIOUR.get(length)
    if behaviour == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if behaviour == "crash":
        raise ValueError("a loss of nerve")
    if behaviour == "bad_alloc":
        sys.stderr.write("terminate called after throwing an instance of 'std::bad_alloc'\n")
        os.kill(os.getpid(), signal.SIGABRT)
    if behaviour == "hang":
        time.sleep(600)
    if behaviour == "refuse":
        report(verdict="does not apply", note="no")
    elif request["limit"] and needed > request["limit"]:
        report(verdict="out of memory", note="too large")
    else:
        report(verdict="ok")


main()
