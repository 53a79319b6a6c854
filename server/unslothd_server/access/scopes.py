"""THE table from RPC to the scope that it needs; a test holds it equal to the contract."""

from unslothd.v1.server_info_pb2 import Scope

READ, TRAIN, ADMIN = Scope.SCOPE_READ, Scope.SCOPE_TRAIN, Scope.SCOPE_ADMIN

# What takes no device time and changes nothing is read; what takes away what others have stored is admin.
SCOPES: "dict[str, Scope.ValueType]" = {
    "GetServerInfo": READ,
    "GetModel": READ,
    "ListModels": READ,
    "GetDataset": READ,
    "ListDatasets": READ,
    "GetTraining": READ,
    "ListTrainings": READ,
    "WatchTraining": READ,
    "DownloadArtifact": READ,
    "LoadModel": TRAIN,
    "PrepareForTraining": TRAIN,
    "UnloadModel": TRAIN,
    "UploadDataset": TRAIN,
    "PlanTraining": TRAIN,
    "Train": TRAIN,
    "CancelTraining": TRAIN,
    "PauseTraining": TRAIN,
    "ResumeTraining": TRAIN,
    "Generate": TRAIN,
    "ExportModel": TRAIN,
    "DeleteDataset": ADMIN,
}


def scope_name(scope: "Scope.ValueType") -> str:
    """The scope as people write it, e.g. "train"."""
    return Scope.Name(scope).removeprefix("SCOPE_").lower()


def scope_of(name: str) -> "Scope.ValueType":
    """The scope that people call so. Raises ValueError for any other word."""
    return Scope.Value(f"SCOPE_{name.upper()}")
