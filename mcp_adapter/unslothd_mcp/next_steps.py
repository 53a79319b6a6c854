"""What an agent does after each reason of an error: which tool to call next, and with what.

The server's own texts speak of RPCs and commands; an agent has tools only. A test holds the table complete.
"""

_CORRECT = "Correct what `message` and `fields` name, then call {tool} again."
_ROWS = (
    "Call unsloth_plan_training with corrected rows to see how they are read (row_format names the layout: text, chat, "
    "prompt_completion, alpaca; template builds text from any columns), then call {tool} again."
)
_MEMORY = (
    "Call unsloth_list_models and give memory back with unsloth_unload_model; or call unsloth_load_model with a "
    "smaller model, load_in_4bit=true or a smaller max_seq_length."
)
_WAIT = "Wait a few seconds, then call {tool} again with the same arguments."
_BY_REASON: dict[str, str] = {
    "INVALID_FIELD": _CORRECT,
    "DATASET_EMPTY": "Give at least one row that holds text, then call {tool} again.",
    "DATASET_COLUMNS": _ROWS,
    "DATASET_ROW": _ROWS,
    "DATASET_DAMAGED": "Make the file anew, then call unsloth_upload_dataset again.",
    "MODEL_NOT_FOUND": "Call unsloth_list_models for the ids that are loaded, or unsloth_load_model.",
    "MODEL_SOURCE_NOT_FOUND": "Correct model_name (a Hub id, or a path on the server), then call unsloth_load_model.",
    "TRAINING_NOT_FOUND": "Call unsloth_list_trainings for the ids that there are.",
    "DATASET_NOT_FOUND": "Call unsloth_list_datasets, or pass the rows themselves, then call {tool} again.",
    "CHECKPOINT_NOT_FOUND": "Call unsloth_get_training for the checkpoints that it has, then call {tool} again.",
    "ARTIFACT_NOT_FOUND": "Call unsloth_export_model to write the files anew.",
    "MODEL_NOT_PREPARED": "Call unsloth_prepare_for_training with this model_id, then call {tool} again.",
    "MODEL_NOT_READY": "Call unsloth_list_models for its state; a failed one is removed by unsloth_unload_model.",
    "MODEL_BUSY": (
        "Call unsloth_list_trainings with this model_id, wait for its end with unsloth_watch_training (or stop it with "
        "unsloth_cancel_training), then call {tool} again."
    ),
    "ALREADY_PREPARED": (
        "Call unsloth_prepare_for_training without lora to keep the adapter, or unsloth_unload_model and "
        "unsloth_load_model to attach another one."
    ),
    "UNSAFE_WEIGHTS": "Call unsloth_load_model with a model that has safetensors or GGUF weights.",
    "REMOTE_CODE_REFUSED": "Choose a model or dataset that needs no code of its own; only the operator can allow it.",
    "TRAINING_STATE": "Call unsloth_get_training for its state and choose what that allows.",
    "DATASET_IN_USE": "Call unsloth_list_trainings for what reads it, and wait for its end.",
    "CHECKPOINT_DAMAGED": "Call unsloth_train to begin anew.",
    "EXPORT_UNSUPPORTED": "Call unsloth_server_info for limits.export_formats, then {tool} with one of them.",
    "REQUEST_ID_REUSED": "Call {tool} again with another request_id, or without one.",
    "OUTPUT_DIR_TAKEN": "Call {tool} again with another output_dir, or without one.",
    "MODEL_ID_TAKEN": "Call unsloth_unload_model for the model of that id, then call {tool} again.",
    "NOT_WRITABLE": "Tell the user that the server may not write to its own folders; its operator has to mend that.",
    "HUB_TOKEN_IN_PLAIN_TEXT": (
        "Tell the user that the connection to the server needs TLS or an SSH tunnel before it may carry a Hugging Face "
        "token, and that a token which the server refused with this reason should be revoked at the Hub."
    ),
    "PATH_NOT_ALLOWED": "Use a path below the roots that the message names, or pass the rows themselves.",
    "HUB_ACCESS_DENIED": "Ask the user for a Hugging Face token with access, or choose an open repository.",
    "INSUFFICIENT_SCOPE": "Tell the user which scope the message names: only a token that has it can do this.",
    "INSUFFICIENT_MEMORY": _MEMORY,
    "MESSAGE_TOO_LARGE": "Call unsloth_upload_dataset in smaller parts, or name a file on the server.",
    "TOO_MANY_MODELS": "Call unsloth_list_models and unsloth_unload_model for one that is not needed.",
    "QUEUE_FULL": "Call unsloth_list_trainings and wait for one to end with unsloth_watch_training.",
    "OUT_OF_MEMORY": (
        "Call unsloth_plan_training with measure=true and a smaller batch_size (and a larger "
        "gradient_accumulation_steps) or use_gradient_checkpointing=true, then call {tool} again."
    ),
    "DISK_FULL": "Tell the user that the server's disk is full; nothing can be written before there is room.",
    "DATASET_TOO_LARGE": "Upload fewer rows, or name a file on the server or a dataset of the Hub.",
    "TOO_MANY_REQUESTS": _WAIT,
    "TOO_MANY_STREAMS": "Wait until another watch or load of this adapter has ended, then call {tool} again.",
    "INLINE_ROWS_TOO_LARGE": "Call unsloth_upload_dataset with the rows, then {tool} with its dataset_id.",
    "DEADLINE_TOO_LONG": "Call {tool} again with a shorter time, or none.",
    "SEQUENCE_OUT_OF_RANGE": "Call unsloth_get_training for last_sequence and watch after that.",
    "OFFSET_OUT_OF_RANGE": _CORRECT,
    "HUB_UNREACHABLE": "Use a model or dataset that is on the server, or try again later.",
    "SERVER_STOPPING": _WAIT,
    "WORKER_DIED": "Call unsloth_unload_model, then unsloth_load_model; a training goes on by unsloth_resume_training.",
    "TRAINING_CANCELLED": "Call unsloth_resume_training to go on from its newest checkpoint, or leave it.",
    "WORKER_UNRESPONSIVE": "Call unsloth_unload_model, then unsloth_load_model.",
    "UPLOAD_STALLED": "Call unsloth_upload_dataset again.",
    "NOT_IMPLEMENTED": "This server cannot do that; call unsloth_server_info for its version and choose another way.",
    "INTERNAL": "Tell the user the error_id: the server's log explains it. Trying once more may help.",
    "TOKEN_MISSING": "Tell the user that the server asks for a token that the adapter does not have.",
    "TOKEN_UNKNOWN": "Tell the user that the server does not know the token; the operator can make one.",
    "TOKEN_EXPIRED": "Tell the user that the token has expired; the operator can make a new one.",
    # The adapter's own.
    "ADAPTER": "Tell the user; the adapter's log (stderr) has the cause.",
    "UNKNOWN_TOOL": "Call one of the tools that tools/list names.",
    "READ_ONLY": "This adapter only looks (--read-only); ask the user to start it without that option.",
    "BUDGET_STEPS": "Call {tool} again with training_config.max_steps within the budget, or ask the user to raise it.",
    "BUDGET_MINUTES": "Ask the user to raise --max-gpu-minutes; what was trained is saved (unsloth_get_training).",
    "FILE_NOT_ALLOWED": "Pass the rows themselves, or ask the user to start the adapter with --allowed-root.",
    "CONFIRMATION_NEEDED": (
        "Show the user what would be lost. If they agree, call {tool} again with the same arguments and the value of "
        "`confirm` from here."
    ),
    "CONFIRMATION_STALE": "What would be lost has changed: show it to the user, and use the new `confirm`.",
    "DECLINED": "The user said no: leave it as it is.",
    "ELICITATION": "Call {tool} again; the answer to its question was not one that it understands.",
    "TRAINING_PAUSED": "Call unsloth_resume_training to go on.",
}
_BY_CODE: dict[str, str] = {
    "UNAVAILABLE": "Tell the user that the server cannot be reached; once it runs, call {tool} again.",
    "DEADLINE_EXCEEDED": "It may have taken effect: call unsloth_list_models or unsloth_list_trainings, then decide.",
    "RESOURCE_EXHAUSTED": "Send less at once: upload rows with unsloth_upload_dataset, then pass the dataset_id.",
    "UNAUTHENTICATED": "Tell the user that the server asks for a token that the adapter does not have.",
}
REASONS = frozenset(_BY_REASON)


def next_step(reason: str, code: str, tool: str) -> str:
    """Returns what to do after an error of a tool.

    Args:
        reason: As in the error; may be unknown or empty.
        code: gRPC status code by name, for reasons that are not known.
        tool: Tool that was called.
    """
    return (_BY_REASON.get(reason) or _BY_CODE.get(code) or _CORRECT).format(tool=tool)
