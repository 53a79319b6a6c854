"""A model's device is where its layers run, also while its embedding lies in RAM."""

import torch

from unslothd_server.engine.devices import bytes_in_ram, compute_device, device_name, on_gpu

# A device other than the CPU that every host has.
ELSEWHERE = torch.device("meta")


def model(embedding: torch.device | str, layers: torch.device | str) -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Embedding(10, 4, device=embedding), torch.nn.Linear(4, 4, bias=False, device=layers)
    )


def test_a_model_with_its_embedding_in_ram_runs_where_its_layers_are():
    split = model("cpu", ELSEWHERE)
    assert compute_device(split) == ELSEWHERE
    assert device_name(split) == "meta:0"
    assert bytes_in_ram(split) == 10 * 4 * 4


def test_a_model_of_one_device_runs_there_and_keeps_nothing_in_ram():
    assert compute_device(model(ELSEWHERE, ELSEWHERE)) == ELSEWHERE
    assert bytes_in_ram(model(ELSEWHERE, ELSEWHERE)) == 0


def test_a_model_on_the_cpu_is_on_no_gpu_and_keeps_nothing_apart():
    whole = model("cpu", "cpu")
    assert (device_name(whole), on_gpu(whole), bytes_in_ram(whole)) == ("cpu", False, 0)
