"""A client of the first hour: runs a training with the stubs of the first commit alone. Arguments: TARGET DATASET.

`first_stubs.zip` holds these stubs as they were (git archive of that commit, without its type hints), so that shallow
clones have them, too. They are imported from the zip, and nothing of today's client is.
"""

import sys
from pathlib import Path

STUBS = Path(__file__).with_name("first_stubs.zip")


def main() -> None:
    """Prints the kind of each event of a training, its heartbeats left out."""
    sys.path.insert(0, str(STUBS))
    import grpc

    from unslothd.v1 import dataset_pb2, service_pb2, service_pb2_grpc

    assert str(STUBS) in str(service_pb2.__file__), service_pb2.__file__
    target, dataset = sys.argv[1:]
    with grpc.insecure_channel(target) as channel:
        stub = service_pb2_grpc.UnslothServiceStub(channel)
        *_, last = stub.LoadModel(service_pb2.LoadModelRequest(model_name="tiny"))
        stub.PrepareForTraining(service_pb2.PrepareForTrainingRequest(model_id=last.model.model_id))
        source = dataset_pb2.DatasetSource(path=dataset)
        request = service_pb2.TrainRequest(model_id=last.model.model_id, train_dataset=source)
        for response in stub.Train(request):
            if response.event.sequence:
                print(response.event.WhichOneof("kind"), flush=True)
        stub.UnloadModel(service_pb2.UnloadModelRequest(model_id=last.model.model_id))


if __name__ == "__main__":
    main()
